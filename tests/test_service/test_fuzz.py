"""Requests by the thousand, made from the served OpenAPI: none breaks the service or its promises.

A few are tried on every run; ``AI_STOCKS_FUZZ_EXAMPLES=2000`` tries that many of each route.
"""

import contextlib
import os
from collections import Counter
from dataclasses import replace

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import Case, GenerationMode
from schemathesis.checks import positive_data_acceptance
from schemathesis.schemas import APIOperation, BaseSchema

from service.api import Services, create_api
from service.edge import WHOLE_PREDICTIONS, EdgeRules
from service.training_service import TrainingService

EXAMPLES = int(os.environ.get("AI_STOCKS_FUZZ_EXAMPLES", "5"))


@pytest.fixture
def fuzzed(services: Services, monkeypatch: pytest.MonkeyPatch) -> BaseSchema:
    # What is queued stays queued until it is cancelled.
    monkeypatch.setattr(services.training, "open", lambda: None)
    api = create_api(replace(services, rules=EdgeRules(rate_per_s=0.0)))
    return schemathesis.openapi.from_asgi("/openapi.json", api)


def operations(schema: BaseSchema) -> list[APIOperation]:
    """Return what is served; a route that only says what to use instead answers 501 by contract."""
    found = [result.ok() for result in schema.get_all_operations()]
    return [one for one in found if "501" not in one.definition.raw["responses"]]


def without_python_names(value: object) -> object:
    """Drop fields in snake case: the models read their Python names too, which no contract says."""
    if isinstance(value, list):
        return [without_python_names(one) for one in value]
    if isinstance(value, dict):
        return {name: without_python_names(one) for name, one in value.items() if "_" not in name}
    return value


# Nothing that can be sent to these is wrong by their schema: they take nothing, or ids that any text may be.
NEVER_ASKED_WRONGLY = {
    "GET /",
    "GET /api/health",
    "GET /api/health/live",
    "GET /api/health/ready",
    "GET /api/models",
    "GET /api/models/{model_id}",
    "DELETE /api/models/{model_id}",
    "POST /api/models/{model_id}/restore",
    "GET /api/models/{model_id}/versions",
    "GET /api/models/{model_id}/download",
    "GET /api/training",
    "GET /api/training/{job_id}",
    "DELETE /api/training/{job_id}",
    "GET /api/training/{job_id}/events",
    "GET /api/jobs/{job_id}/events",
}


@pytest.mark.timeout(300 + 3 * EXAMPLES)
@pytest.mark.parametrize("mode", list(GenerationMode))
def test_no_request_breaks_a_promise(
    fuzzed: BaseSchema, training: TrainingService, mode: GenerationMode, subtests: pytest.Subtests
) -> None:
    tried: Counter[str] = Counter()

    def holds(case: Case) -> None:
        tried[case.operation.label] += 1
        case.body = without_python_names(case.body)
        # No schema can say that the arrays of a posted prediction are equally long and its dates ascend.
        loose = case.operation.path in WHOLE_PREDICTIONS
        answer = case.call_and_validate(excluded_checks=[positive_data_acceptance] if loose else [])
        if case.operation.path == "/api/training/start" and answer.status_code == 200:
            # A full queue is refused with a 503, as it should be.
            training.cancel(answer.json()["jobId"])

    limits = settings(
        max_examples=EXAMPLES, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
    )
    served = operations(fuzzed)
    for operation in served:
        # One broken route must not hide the others.
        with subtests.test(operation.label), contextlib.suppress(Unsatisfiable):
            limits(given(case=operation.as_strategy(generation_mode=mode))(holds))()
    untried = {one.label for one in served} - tried.keys()
    assert untried == (NEVER_ASKED_WRONGLY if mode == GenerationMode.NEGATIVE else set())
