"""Where people look at features: an atlas as a web page, served from this machine or exported to a folder.

    inputs    the artifacts a page is made of, opened and checked
    data      atlas -> plain JSON, the same for server and export
    server    that JSON and the page over HTTP, on this machine only, read-only
    export    that JSON as scripts beside the page, so that it opens from disk
    static    the page: classic scripts, two vendored libraries, no build step

Knows atlases. Knows neither models nor dictionaries, and never loads torch.
"""

from sememe.browse.data import Data
from sememe.browse.export import ExportConfig, export
from sememe.browse.server import BrowseConfig, browse

__all__ = ["BrowseConfig", "Data", "ExportConfig", "browse", "export"]
