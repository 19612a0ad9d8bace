"""The real SDK's side of sdk.test.ts: reads JSON from standard input, writes JSON.

write: fields of configurations, each to its two dumps. read: dumps, each to its fields.
"""

import json
import sys

from practicuscore import WorkerConfig
from pydantic import BaseModel


def plain(value):
    if isinstance(value, BaseModel):
        fields = {name: plain(getattr(value, name)) for name in type(value).model_fields}
        return {name: field for name, field in fields.items() if field is not None}
    return [plain(each) for each in value] if isinstance(value, list) else value


def write(fields):
    config = WorkerConfig(**fields)
    return [config.model_dump_json(exclude_none=True), config.model_dump_json()]


def read(dump):
    fields = plain(WorkerConfig(**json.loads(dump)))
    del fields["additional_params"]
    return fields


steps = {"write": write, "read": read}
json.dump([steps[sys.argv[1]](each) for each in json.load(sys.stdin)], sys.stdout)
