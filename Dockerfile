# A server for one index, without torch: docs/serve.md has the commands. Not built yet.
FROM python:3.11-slim

WORKDIR /opt/anysplade
COPY pyproject.toml README.md LICENSE ./
COPY src src
# The tests of the libraries are an eighth of what is installed.
RUN pip install --no-cache-dir ".[serve]" \
    && find /usr/local/lib/python3.11/site-packages -type d -name tests -prune -exec rm -r {} +

# The index and its model, exported to ONNX, are mounted at /data, read-only if wanted.
RUN useradd --create-home anysplade
USER anysplade
WORKDIR /data
VOLUME /data
EXPOSE 8080
HEALTHCHECK --start-period=60s CMD ["python", "-c", "import os, urllib.request as r; \
r.urlopen(r.Request('http://127.0.0.1:8080/health', headers={'Authorization': 'Bearer ' + os.environ['ANYSPLADE_TOKEN']}))"]

# Outside of loopback the server needs a token: ANYSPLADE_TOKEN in the environment.
ENTRYPOINT ["anysplade", "serve", "--host", "0.0.0.0", "--port", "8080"]
CMD ["index", "--model", "onnx"]
