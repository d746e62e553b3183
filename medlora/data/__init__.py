"""Files of rows -> records, with what is wrong with each row."""
