"""The paper's experiments, with controls and error bars."""

from anysplade._common.extras import extra

with extra("study"):
    import jinja2  # noqa: F401  (so that a missing extra is told before hours of training)
    import pydantic  # noqa: F401
