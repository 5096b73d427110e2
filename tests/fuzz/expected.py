"""Refusals of requests that fit the document: what no schema can say, each by its code and with its reason.

A request that fits the document is accepted, or refused by one of these, or refused for what only the server knows (404, 409, 412, 429).
"""

from __future__ import annotations

from typing import Any

from powergrad.jobs.spec import BEYOND_THE_SCHEMA

OF_SPECS = {(pointer, code): rule for pointer, code, rule in BEYOND_THE_SCHEMA}
OF_PROBLEMS = {
    "idempotency_mismatch": "the key came before with another body",
    "bad_archive": "which bytes are an archive is for its reader to say",
    "unreadable_image": "which bytes are an image is for a decoder to say",
}
OF_PARAMETERS = {
    ("name", "missing"): "it is given with an archive, and only with one: the document knows no rule between parameters and bodies",
    ("name", "not_available"): "the same",
    ("unreadable", "not_available"): "the same",
    ("offset", "conflict"): "it is given with tail: the document knows no rule between parameters",
    ("limit", "out_of_range"): "it is lower for whole jobs than for summaries: the document knows no rule between parameters",
    ("state", "missing_filter"): "it or another filter must be given: the document knows no rule between parameters",
}
OF_NAMES = {
    ("/data/dataset", "unknown_name"): "404 when it is all that is wrong; beside other errors it is told with them",
    ("/model/name", "unknown_name"): "the same",
    ("/webhook/url", "address_refused"): "where a server may call is its operator's to say",
    ("/url", "address_refused"): "the same",
}
OF_QUESTIONS = ("/grid", "/tune", "/space", "/baseline", "/metric")
"""Values of any field of a spec, and what depends on them: which are right is for the spec to say."""
OF_EXPERIMENTS = {
    ("/seeds", "out_of_range"): "an experiment has so many runs at most, and the document multiplies no lengths",
    ("/count", "out_of_range"): "the same",
    ("/spec/seed", "out_of_range"): "tuning takes its seeds from far beyond it",
    ("/labels", "out_of_range"): "together with those of the spec and of the experiment itself",
    ("/tuning/epochs", "out_of_range"): "a run of tuning is a spec too, with rules between its fields",
}
OF_LABELS = ("/labels", "/spec/labels")
"""Of an experiment: four names are its own."""
OF_CLONES = ("/set", "/from_checkpoint")
"""Changes to a spec that the server has: only it knows whether the whole still fits."""


def is_beyond_the_schema(problem: dict[str, Any]) -> bool:
    """Whether a 422 is for nothing but what the document cannot say."""
    if problem.get("code") in OF_PROBLEMS:
        return True
    errors = problem.get("errors", [])
    return bool(errors) and all(_is_expected(one) for one in errors)


def _is_expected(error: dict[str, Any]) -> bool:
    pointer = error.get("pointer") or ""
    if pointer.startswith(OF_CLONES + OF_QUESTIONS) or (pointer, error["code"]) in OF_EXPERIMENTS:
        return True
    if (pointer.removeprefix("/spec"), error["code"]) in OF_SPECS | OF_NAMES:
        return True
    if error["code"] == "would_be_ignored" and pointer.rpartition("/")[0] in OF_LABELS:
        return True
    if (error.get("parameter"), error["code"]) in OF_PARAMETERS:
        return True
    # to JSON Schema 1.0 is an integer; in a spec an integer is written as one
    value = error.get("value")
    return error["code"] == "wrong_type" and isinstance(value, float) and value.is_integer()
