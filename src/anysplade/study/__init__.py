"""The paper's experiments with controls and error bars.

The modules in the order of a study: plan, cells, run, results, conclusions, report. ``pipeline`` calls them.
"""

from anysplade._common.extras import extra

with extra("study"):
    import jinja2  # noqa: F401  (report a missing extra before hours of training)
    import pydantic  # noqa: F401
