import pickle

import pytest

from anysplade.errors import AnyspladeError, OptionError, without_credentials


@pytest.mark.parametrize(
    "text, expected",
    [
        ("opensearch://me:canary@host:9200/docs", "opensearch://...@host:9200/docs"),
        ("opensearchs://me:c%40nary%2F@host/docs", "opensearchs://...@host/docs"),
        ("opensearch://me:can@ry@host/docs", "opensearch://...@host/docs"),
        ("opensearch://me:can/ary@host/docs", "opensearch://...@host/docs"),
        ("opensearch://me:12/canary@host/docs", "opensearch://...@host/docs"),
        ("opensearch://me:can?#ary@host/docs", "opensearch://...@host/docs"),
        ("opensearch://me:can ary@host/docs", "opensearch://...@host/docs"),
        ("opensearch:/me:canary@host/docs: no index there", "opensearch:/...@host/docs: no index there"),  # through a Path
        ("https://canary@host/org/name", "https://...@host/org/name"),
        ("https://me:can/ary@host/org/name", "https://...@host/org/name"),
        (
            "a proxy http://me:canary@proxy:3128/ and HTTPS://me:canary@proxy",
            "a proxy http://...@proxy:3128/ and HTTPS://...@proxy",
        ),
        ("'qdrant://me:canary@h/d' 'a@b'", "'qdrant://...@h/d' 'a@b'"),
        ("anysplade serve index --token canary --port 1", "anysplade serve index --token ... --port 1"),
        ("anysplade serve index --token=canary --port 1", "anysplade serve index --token=... --port 1"),
        ("anysplade serve index --api-key 'canary with '\"'\"' in it' --port 1", "anysplade serve index --api-key ... --port 1"),
        ("HF_TOKEN=canary QDRANT_API_KEY=canary x", "HF_TOKEN=... QDRANT_API_KEY=... x"),
        ("https://host/file?X-Amz-Signature=canary&part=2", "https://host/file?X-Amz-Signature=...&part=2"),
    ],
)
def test_credentials_are_taken_out(text, expected):
    assert "canary" not in expected
    assert without_credentials(text) == expected
    assert without_credentials(expected) == expected
    assert str(OptionError(text)) == expected
    assert str(pickle.loads(pickle.dumps(AnyspladeError(text)))) == expected


@pytest.mark.parametrize(
    "text",
    [
        "https://medium.com/@someone/a-post",
        "http://localhost:8080/@x/y",
        "opensearch://user:password@localhost:9200/docs",  # an example in a message
        "qdrant://host:6333/docs, and write to me@example.org",
        "--token: at least 16 ASCII characters, or it can be guessed",
        "--host 0.0.0.0: needs --token, which every request must carry",
        "anysplade train bert-tiny data.jsonl --out run --query-prompt 'query: '",
        "document 'a@b:c@d': is a duplicate",
    ],
)
def test_what_is_no_credential_stays(text):
    assert without_credentials(text) == text
