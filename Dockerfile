# A server for one index: docs/serve.md has the commands. Not built yet.
FROM python:3.11-slim

# On Linux, PyPI's torch is the CUDA build, several GB large.
RUN pip install --no-cache-dir torch --index-url https://download.pytorch.org/whl/cpu

WORKDIR /opt/anysplade
COPY pyproject.toml README.md LICENSE ./
COPY src src
RUN pip install --no-cache-dir ".[serve]"

# The index and its model are mounted at /data, read-only if wanted.
RUN useradd --create-home anysplade
USER anysplade
WORKDIR /data
VOLUME /data
EXPOSE 8080
HEALTHCHECK --start-period=60s CMD ["python", "-c", "import os, urllib.request as r; \
r.urlopen(r.Request('http://127.0.0.1:8080/health', headers={'Authorization': 'Bearer ' + os.environ['ANYSPLADE_TOKEN']}))"]

# Outside of loopback the server needs a token: ANYSPLADE_TOKEN in the environment.
ENTRYPOINT ["anysplade", "serve", "--host", "0.0.0.0", "--port", "8080"]
CMD ["index"]
