"""The book's figures: one module a chapter, named by its topic; a function returns a Figure."""
