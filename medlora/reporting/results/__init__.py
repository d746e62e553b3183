"""The files that show an evaluation: report, questions to browse, tables for a paper."""
