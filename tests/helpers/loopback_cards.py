"""The metadata of a README as the Hub's `validate-yaml` looks at it: what the Hub's documentation says of its fields."""

import yaml

LICENSES = """apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0
bigcode-openrail-m afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0
cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0
cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0
cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0 lgpl
lgpl-2.1 lgpl-3.0 isc h-research intel-research lppl-1.3c ms-pl apple-ascl apple-amlr mpl-2.0 odc-by odbl openmdw-1.0
openmdw-1.1 openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr deepfloyd-if-license
fair-noncommercial-research-license llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 grok2-community gemma unknown
other""".split()
SDKS = ["gradio", "docker", "static", "streamlit"]
COLORS = ["red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray"]
STRINGS = ["pipeline_tag", "library_name", "license_name", "license_link", "pretty_name", "title", "emoji", "app_file"]
STRING_OR_LIST = ["language", "license", "base_model", "thumbnail"]
LISTS = ["tags", "datasets", "metrics", "task_categories", "size_categories", "models", "annotations_creators"]


class UniqueKeyLoader(yaml.SafeLoader):
    """`yaml.SafeLoader` that refuses a key given twice, as the Hub's parser does."""

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"duplicated mapping key: {key}", node.start_mark)
        return super().construct_mapping(node, deep)


def read_metadata(content):
    """The mapping between the first two `---` lines, `None` where there is no such block. Raises `ValueError`."""
    lines = content.lstrip("\ufeff").splitlines()
    if not lines or lines[0].rstrip() != "---":
        return None
    end = next((number for number, line in enumerate(lines[1:], 1) if line.rstrip() == "---"), None)
    if end is None:
        return None
    try:
        metadata = yaml.load("\n".join(lines[1:end]), Loader=UniqueKeyLoader)
    except yaml.YAMLError as error:
        raise ValueError(f"YAML metadata is invalid: {error}") from error
    if metadata is None:
        return None
    if not isinstance(metadata, dict):
        raise ValueError(f"YAML metadata must be a mapping, got {type(metadata).__name__}")
    return metadata


def check_card(content, kind):
    """Errors and warnings, as two lists of sentences."""
    try:
        metadata = read_metadata(content)
    except ValueError as error:
        return [str(error)], []
    if metadata is None:
        if kind == "space":
            return ["Missing configuration in README: a Space needs `sdk`"], []
        return [], ["empty or missing yaml metadata in repo card"]
    errors, warnings = [], []

    for name in STRINGS:
        if not isinstance(metadata.get(name, ""), str):
            errors.append(f'"{name}" must be a string')
    for name in LISTS:
        value = metadata.get(name, [])
        if not isinstance(value, list) or not all(isinstance(entry, str) for entry in value):
            errors.append(f'"{name}" must be an array of strings')
    for name in STRING_OR_LIST:
        value = metadata.get(name, [])
        if not all(isinstance(entry, str) for entry in (value if isinstance(value, list) else [value])):
            errors.append(f'"{name}" must be a string or an array of strings')

    licenses = metadata.get("license", [])
    for license in licenses if isinstance(licenses, list) else [licenses]:
        if isinstance(license, str) and license not in LICENSES:
            errors.append(f'"license" must be one of [{", ".join(LICENSES)}], got "{license}"')
    if licenses == "other" and "license_name" not in metadata:
        warnings.append('"license_name" is missing: it names the license where "license" is "other"')

    if kind == "space":
        if metadata.get("sdk") not in SDKS:
            errors.append(f'"sdk" must be one of [{", ".join(SDKS)}]')
        for name in ("colorFrom", "colorTo"):
            if metadata.get(name, "red") not in COLORS:
                errors.append(f'"{name}" must be one of [{", ".join(COLORS)}]')
        if not isinstance(metadata.get("pinned", False), bool):
            errors.append('"pinned" must be a boolean')
        if len(str(metadata.get("short_description", ""))) > 60:
            errors.append('"short_description" length must be less than or equal to 60 characters long')
    if "model-index" in metadata:
        errors += check_model_index(metadata["model-index"])
    return errors, warnings


def check_model_index(index):
    """`[{name, results: [{task: {type}, dataset: {name, type}, metrics: [{type, value}]}]}]`, else what it lacks."""
    if not isinstance(index, list):
        return ['"model-index" must be an array']
    errors = []

    def missing(place, entry, *names):
        if not isinstance(entry, dict):
            errors.append(f'"{place}" must be of type object')
            return True
        lacking = [name for name in names if entry.get(name) is None]
        errors.extend(f'"{place}.{name}" is required' for name in lacking)
        return bool(lacking)

    for number, model in enumerate(index):
        place = f"model-index[{number}]"
        if missing(place, model, "name", "results"):
            continue
        if not isinstance(model["results"], list):
            errors.append(f'"{place}.results" must be an array')
            continue
        for row, result in enumerate(model["results"]):
            here = f"{place}.results[{row}]"
            if missing(here, result, "task", "dataset", "metrics"):
                continue
            missing(f"{here}.task", result["task"], "type")
            missing(f"{here}.dataset", result["dataset"], "name", "type")
            if not isinstance(result["metrics"], list):
                errors.append(f'"{here}.metrics" must be an array')
                continue
            for column, metric in enumerate(result["metrics"]):
                missing(f"{here}.metrics[{column}]", metric, "type", "value")
    return errors
