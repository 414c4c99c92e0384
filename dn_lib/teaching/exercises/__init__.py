"""The book's exercises, a module for each chapter, each with a list `ENTRIES`."""
