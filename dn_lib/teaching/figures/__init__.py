"""The drawings of the chapters, a module for each: what is drawn is computed by the package, or handed in."""
