"""Know which members of a cell hold which blocks."""
