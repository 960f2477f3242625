"""The fields of a request that say what the text must be like: OpenAI's, vLLM's and SGLang's. They
all become `StructuredOutputsParams`."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from minidcp.config import require, shorten
from minidcp.structured_outputs import StructuredOutputsParams

MAX_CHOICES = 4096

Schema = dict[str, Any] | str | bool
Choices = Annotated[list[str], Field(fail_fast=True, max_length=MAX_CHOICES)]

# Fields that hold one constraint, with its name in StructuredOutputsParams.
KIND_OF_FIELD = {
    "guided_json": "json",
    "guided_regex": "regex",
    "guided_choice": "choice",
    "guided_grammar": "grammar",
    "json_schema": "json",
    "regex": "regex",
    "ebnf": "grammar",
}
# Parts of vLLM's structured_outputs that would have no effect here.
UNSUPPORTED_OPTIONS = ("structural_tag", "disable_additional_properties")


class JsonSchemaFormat(BaseModel):
    name: str | None = None
    description: str | None = None
    schema_: Schema | None = Field(None, alias="schema")
    strict: bool | None = Field(None, description="the schema is always enforced")


class ResponseFormat(BaseModel):
    """OpenAI's field."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = Field(None, description="with type json_schema")


class StructuredOutputs(BaseModel, extra="allow"):
    """vLLM's field. Exactly one of the first five must be given."""

    json_: Schema | None = Field(None, alias="json")
    regex: str | None = None
    choice: Choices | None = None
    grammar: str | None = None
    json_object: bool | None = None
    disable_any_whitespace: bool | None = None
    whitespace_pattern: str | None = None


class StructuredOutputFields(BaseModel):
    """A part of the bodies in `protocol.py`. At most one of these fields may ask for something."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: Schema | None = Field(None, description="a JSON Schema, as an object or a text")
    guided_regex: str | None = None
    guided_choice: Choices | None = None
    guided_grammar: str | None = Field(None, description="in Lark's notation, or GBNF")
    guided_whitespace_pattern: str | None = Field(None, description="with guided_json")
    json_schema: Schema | None = Field(None, description="SGLang's name of guided_json")
    regex: str | None = Field(None, description="SGLang's name of guided_regex")
    ebnf: str | None = Field(None, description="SGLang's name of guided_grammar")

    def choose_structured_outputs(self) -> StructuredOutputsParams | None:
        """Raises ValueError, naming the field, if one is wrong or several ask for something."""
        wanted = []
        for wish in (self.read_response_format(), self.read_structured_outputs()):
            if wish is not None:
                wanted.append(wish)
        for name, kind in KIND_OF_FIELD.items():
            value = getattr(self, name)
            if value is not None and value not in ("", []):  # which ask for nothing
                options: dict[str, Any] = {
                    kind: value,
                    "whitespace_pattern": self.guided_whitespace_pattern,
                }
                wanted.append(StructuredOutputsParams(**options, field=name))

        require(
            len(wanted) <= 1,
            f"{' and '.join(wish.field for wish in wanted)}: only one of them may be given",
        )
        return wanted[0] if wanted else None

    def read_response_format(self) -> StructuredOutputsParams | None:
        given = self.response_format
        if given is None or given.type == "text":
            return None
        if given.type == "json_object":
            return StructuredOutputsParams(json_object=True, field="response_format")
        schema = given.json_schema.schema_ if given.json_schema is not None else None
        require(schema is not None, "response_format: json_schema has no schema; give one")
        return StructuredOutputsParams(json=schema, field="response_format")

    def read_structured_outputs(self) -> StructuredOutputsParams | None:
        given = self.structured_outputs
        if given is None or not given.model_fields_set:
            return None
        for name in UNSUPPORTED_OPTIONS:
            value = (given.model_extra or {}).get(name)
            require(
                not value,
                f"structured_outputs: {name} {shorten(value)} is not supported; leave it out",
            )
        return StructuredOutputsParams(
            json=given.json_,
            regex=given.regex,
            choice=given.choice,
            grammar=given.grammar,
            json_object=given.json_object,
            disable_any_whitespace=bool(given.disable_any_whitespace),
            whitespace_pattern=given.whitespace_pattern,
        )
