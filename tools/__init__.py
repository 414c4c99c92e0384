"""How the book is made: `make notebooks` (tools.notebooks) and `make book` (tools.site)."""
