"""Pages to look at: each one HTML file that loads nothing, of a profile, an export or the tables of a sweep."""

from qdeploy.page.export import of_export
from qdeploy.page.profile import of_profile
from qdeploy.page.report import of_report

__all__ = ["of_export", "of_profile", "of_report"]
