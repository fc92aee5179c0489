"""A page that fine-tunes in a browser: the folder it is served from, and the server. The page itself is in `page/`."""
