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

EXAMPLES = int(os.environ.get("AI_STOCKS_FUZZ_EXAMPLES", "5"))


@pytest.fixture
def fuzzed(services: Services) -> BaseSchema:
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


@pytest.mark.parametrize("mode", list(GenerationMode))
def test_no_request_breaks_a_promise(fuzzed: BaseSchema, mode: GenerationMode) -> None:
    tried: Counter[str] = Counter()

    def holds(case: Case) -> None:
        tried[case.operation.label] += 1
        case.body = without_python_names(case.body)
        # No schema can say that the arrays of a posted prediction are equally long and its dates ascend.
        loose = case.operation.path in WHOLE_PREDICTIONS
        case.call_and_validate(excluded_checks=[positive_data_acceptance] if loose else [])

    limits = settings(
        max_examples=EXAMPLES, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
    )
    for operation in operations(fuzzed):
        # A route that takes nothing cannot be asked wrongly.
        with contextlib.suppress(Unsatisfiable):
            limits(given(case=operation.as_strategy(generation_mode=mode))(holds))()
    assert len(tried) >= 2, tried
