"""Pages to look at: each one HTML file that loads nothing, of a profile, an export or the tables of a sweep."""

from qdeploy.page.export import of_export
from qdeploy.page.profile import of_profile

__all__ = ["of_export", "of_profile"]
