"""Collections that ir_datasets knows from memory, for tests."""

import ir_datasets
from ir_datasets.datasets.base import Dataset
from ir_datasets.formats import BaseDocPairs, BaseDocs, BaseQrels, BaseQueries, GenericDocPair, GenericQuery, TrecQrel
from ir_datasets.formats.base import GenericDoc
from ir_datasets.indices import Docstore


class Docs(BaseDocs):
    def __init__(self, documents, kind=GenericDoc):
        self.documents, self.kind = documents, kind

    def docs_iter(self):
        yield from (self.kind(*document) for document in self.documents)

    def docs_cls(self):
        return self.kind

    def docs_store(self, **kwargs):
        return DictDocstore(self)


class DictDocstore(Docstore):
    def __init__(self, docs):
        super().__init__(docs.kind)
        self.docs = {document.doc_id: document for document in docs.docs_iter()}

    def get_many_iter(self, ids):
        yield from (self.docs[id_] for id_ in ids if id_ in self.docs)


class Queries(BaseQueries):
    def __init__(self, queries):
        self.queries = queries

    def queries_iter(self):
        yield from (GenericQuery(*query) for query in self.queries.items())

    def queries_cls(self):
        return GenericQuery


class Qrels(BaseQrels):
    def __init__(self, qrels):
        self.qrels = qrels

    def qrels_iter(self):
        for query, grades in self.qrels.items():
            yield from (TrecQrel(query, document, grade, "0") for document, grade in grades.items())

    def qrels_cls(self):
        return TrecQrel

    def qrels_defs(self):
        return {}


class Triples(BaseDocPairs):
    def __init__(self, triples):
        self.triples = triples

    def docpairs_iter(self):
        yield from (GenericDocPair(*triple) for triple in self.triples)

    def docpairs_cls(self):
        return GenericDocPair


def register(name, *parts):
    if name in ir_datasets.registry:
        del ir_datasets.registry._registered[name]
    ir_datasets.registry.register(name, Dataset(*parts))
