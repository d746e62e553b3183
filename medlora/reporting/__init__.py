"""What people read: reports, pages, tables, progress."""
