"""Pages for a browser: what all of them share, and the server that shows one while a run goes.

`document` makes a page and its tables, `drawing` the plots in it, `watch` serves a run's page.
"""
