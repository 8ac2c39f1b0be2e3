"""The page as a folder of files that runs the model in the browser itself: `mobilellm web`.

folder.py     the page, a backend that is a worker, an ONNX export, and what runs it
packages.py   that last part, from the npm registry: pinned, checked, kept in the user's cache
page/         the modules that take the place of the page's connection to a server
"""
