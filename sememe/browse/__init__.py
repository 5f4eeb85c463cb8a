"""Where people look at features: an atlas as a web page, served from this machine or exported to a folder.

    inputs    the artifacts a page is made of, opened and checked
    data      atlas -> plain JSON, the same for server and export
    server    that JSON and the page over HTTP
    guard     who may ask the server what
    openapi   what can be asked, described
    serving   the server's life: folders, sockets, the end
    live      what the page asks of a model, and the child process that answers
    notes     what people say of latents, in a file beside the atlas
    compared  two atlases side by side
    together  several atlases on one page
    written   values as JSON text
    export    that JSON as scripts beside the page, so that it opens from disk
    static    the page: classic scripts, two vendored libraries, no build step

Knows atlases, and of dictionaries only where they write. Knows no model, and never loads torch.
"""

from sememe.browse.data import Data
from sememe.browse.export import ExportConfig, export
from sememe.browse.live import Child, Live
from sememe.browse.serving import BrowseConfig, browse

__all__ = ["BrowseConfig", "Child", "Data", "ExportConfig", "Live", "browse", "export"]
