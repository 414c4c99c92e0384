"""What the book's site has beyond Sphinx: previews, excerpts in the search, buttons, and pages made from the package.

Each module is a Sphinx extension for the HTML builder; in a PDF they change nothing, except that `reference` and
`results` write pages.  Everything works from `file://`, where a page cannot fetch another: what a script needs is
written into a script.
"""
