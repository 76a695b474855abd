"""The search page and the HTTP API over an index."""

from anysplade._common.extras import extra

with extra("serve"):
    import fastapi  # noqa: F401  (here, so that a missing extra is reported by any module of the package)
    import jinja2  # noqa: F401
    import prometheus_client  # noqa: F401
    import uvicorn  # noqa: F401
