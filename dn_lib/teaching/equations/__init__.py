"""The book's equations, a module for each chapter, each with a list `ENTRIES`."""
