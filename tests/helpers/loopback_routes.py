"""What the loopback Hub answers: one function per endpoint that `huggingface_hub` calls, and the table of them all.

Each takes the request and returns `(status, body)` or `(status, body, headers)`; errors are raised as `HubError`. A body
that is no `bytes` is sent as JSON.
"""

import base64
import hashlib
import json
import re
import secrets
from urllib.parse import parse_qs

from loopback_cards import check_card, read_metadata
from loopback_collections import COLLECTION_ROUTES
from loopback_store import KINDS, LFS_ABOVE, LFS_SUFFIXES, File, HubError, git_hash, now


def whoami(request):
    user = request.user
    if user is None:
        raise HubError(401, "Invalid username or password.")
    orgs = [{"type": "org", "name": name, "fullname": name, "roleInOrg": "write"} for name in user.orgs]
    token = {"type": "access_token", "accessToken": {"displayName": "loopback", "role": user.role}}
    answer = {"type": "user", "id": git_hash(user.name.encode())[:24], "name": user.name, "fullname": user.name}
    return 200, answer | {"email": f"{user.name}@example.org", "isPro": False, "orgs": orgs, "auth": token}


def agent_harnesses(request):
    return 200, {"standardEnvVars": [], "harnesses": {}}


def telemetry(request):
    return 200, {}


def validate_yaml(request):
    body = request.json()
    errors, warnings = check_card(body["content"], body.get("repoType", "model"))
    answer = {"errors": [{"message": e} for e in errors], "warnings": [{"message": w} for w in warnings]}
    if errors:
        raise HubError(400, "Invalid metadata in README.md", **answer)
    return 200, answer


# Repositories


def create_repo(request):
    body = request.json()
    if request.user is None:
        raise HubError(401, "Invalid username or password.")
    id = f"{body.get('organization') or request.user.name}/{body['name']}"
    kind, private = body.get("type") or "model", body.get("visibility") == "private" or body.get("private") is True
    url = f"{request.hub.endpoint}/{'' if kind == 'model' else kind + 's/'}{id}"
    try:
        repo = request.store.create(request.user, kind, id, private, body.get("sdk"))
    except HubError as error:
        if error.status == 409:
            error.body["url"] = url
        raise
    return 200, {"url": url, "name": repo.id, "id": git_hash(url.encode())[:24], "private": private}


def delete_repo(request):
    body = request.json()
    id = f"{body.get('organization') or request.user.name}/{body['name']}"
    repo = request.store.repo(request.user, body.get("type") or "model", id, write=True)
    del request.store.repos[repo.kind, repo.id]
    return 200, {}


def move_repo(request):
    """The old name goes on leading to the repository. (The real Hub redirects to the new one.)"""
    body, store = request.json(), request.store
    repo = store.repo(request.user, body["type"], body["fromRepo"], write=True)
    store.may_write(request.user, body["toRepo"].split("/")[0])
    if (repo.kind, body["toRepo"]) in store.repos:
        raise HubError(409, f"{body['toRepo']} exists already")
    store.moved[repo.kind, repo.id] = body["toRepo"]
    store.repos[repo.kind, body["toRepo"]] = store.repos.pop((repo.kind, repo.id))
    repo.id = body["toRepo"]
    return 200, {}


def settings(request):
    repo, body = request.repo(write=True), request.json()
    if "visibility" in body or "private" in body:
        repo.private = body.get("visibility") == "private" or body.get("private") is True
    repo.gated = body.get("gated", repo.gated)
    return 200, {"private": repo.private, "gated": repo.gated}


def describe(repo, commit, blobs=False):
    """A repository at one commit, as `model_info`, `dataset_info` and `space_info` read it."""
    try:
        readme = commit.files.get("README.md", File(b"", False)).content.decode(errors="replace")
        card = read_metadata(readme) or {}
    except ValueError:
        card = {}
    tags = card.get("tags")
    siblings = [{"rfilename": path} for path in commit.files]
    if blobs:
        for row, file in zip(siblings, commit.files.values(), strict=True):
            row |= {"size": len(file.content), "blobId": file.blob_id}
            if file.lfs:
                row["lfs"] = {"sha256": file.sha256, "size": len(file.content), "pointerSize": len(file.pointer)}
    answer = {"_id": git_hash(repo.path.encode())[:24], "id": repo.id, "author": repo.id.split("/")[0]}
    answer |= {"sha": commit.id, "lastModified": commit.date, "createdAt": repo.created, "private": repo.private}
    answer |= {
        "gated": repo.gated,
        "disabled": False,
        "downloads": 0,
        "likes": 0,
        "siblings": siblings,
        "cardData": card,
    }
    answer["tags"] = [tag for tag in tags if isinstance(tag, str)] if isinstance(tags, list) else []
    if isinstance(card.get("license"), str):
        answer["tags"].append(f"license:{card['license']}")
    if repo.kind == "model":
        answer |= {
            "modelId": repo.id,
            "spaces": [],
            "model-index": card.get("model-index"),
            "pipeline_tag": card.get("pipeline_tag"),
        }
        answer |= {"library_name": card.get("library_name")}
    if repo.kind == "space":
        runtime = {"stage": "NO_APP_FILE", "hardware": {"current": None, "requested": None}, "storage": None}
        answer |= {"sdk": card.get("sdk", repo.sdk), "runtime": runtime, "models": [], "datasets": []}
    return answer


def repo_info(request):
    repo = request.repo()
    commit = repo.resolve(request.args.get("rev", "main"))
    return 200, describe(repo, commit, blobs=request.flag("blobs"))


def list_repos(request):
    kind, query = KINDS[request.args["kinds"]], request.query
    rows = []
    for repo in request.store.repos.values():
        namespace = repo.id.split("/")[0]
        visible = not repo.private or (request.user and namespace in (request.user.name, *request.user.orgs))
        if repo.kind != kind or not visible or query.get("author", [namespace])[0] != namespace:
            continue
        row = describe(repo, repo.resolve("main"))
        wanted = set(",".join(query.get("filter", [])).split(",")) - {""}
        if query.get("search", [""])[0].lower() in repo.id.lower() and wanted <= set(row["tags"]):
            rows.append(row)
    return 200, rows[: int(query.get("limit", [1000])[0])]


# What a revision holds


def tree(request):
    repo, rev = request.repo(), request.args["rev"]
    folder, recursive, expand = request.args.get("path"), request.flag("recursive"), request.flag("expand")
    prefix = f"{folder}/" if folder else ""
    files = repo.resolve(rev).files
    paths = set()
    for name in files:
        if name.startswith(prefix):
            parts = name.removeprefix(prefix).split("/")
            shown = range(1, len(parts) + 1) if recursive else [1]
            paths.update(prefix + "/".join(parts[:depth]) for depth in shown)
    if folder and not paths:
        raise HubError(404, f'{folder} does not exist on "{rev}"', "EntryNotFound")
    paths, start, size = sorted(paths), int(request.query.get("cursor", [0])[0]), request.hub.page_size
    headers = {}
    if start + size < len(paths):
        query = f"recursive={recursive}&expand={expand}&cursor={start + size}"
        headers["Link"] = f'<{request.hub.endpoint}{request.raw_path}?{query}>; rel="next"'
    return 200, [repo.entry(path, rev, expand) for path in paths[start : start + size]], headers


def paths_info(request):
    repo = request.repo()
    if "json" in request.headers.get("Content-Type", ""):
        body = request.json()
        paths, expand = body["paths"], bool(body.get("expand"))
    else:
        body = parse_qs(request.body.decode())
        paths, expand = body.get("paths", []), body.get("expand", [""])[0].lower() == "true"
    rows = [repo.entry(path.strip("/"), request.args["rev"], expand) for path in paths]
    return 200, [row for row in rows if row is not None]


def refs(request):
    repo = request.repo()
    answer = {"converts": []}
    for key, prefix, names in (("branches", "refs/heads/", repo.branches), ("tags", "refs/tags/", repo.tags)):
        answer[key] = [{"name": name, "ref": prefix + name, "targetCommit": id} for name, id in names.items()]
    if request.flag("include_prs"):
        pulls = [{"name": name, "ref": f"refs/pr/{name}", "targetCommit": id} for name, id in repo.pulls.items()]
        answer["pullRequests"] = pulls
    return 200, answer


def commits(request):
    rows = []
    for commit in request.repo().history(request.args["rev"]):
        row = {"id": commit.id, "title": commit.title, "message": commit.message, "date": commit.date}
        rows.append(row | {"authors": [{"user": commit.author, "avatar": ""}]})
    return 200, rows


def resolve(request):
    """A file at a revision, whole or in part."""
    repo = request.repo()
    commit = repo.resolve(request.args["rev"])
    path, headers = request.args["path"], {"X-Repo-Commit": commit.id, "Accept-Ranges": "bytes"}
    if path not in commit.files:
        request.extra_headers = headers
        raise HubError(404, "Entry not found", "EntryNotFound")
    file = commit.files[path]
    content, total = file.content, len(file.content)
    headers |= {"ETag": f'"{file.etag}"', "Content-Type": "application/octet-stream"}
    headers["Content-Disposition"] = f'inline; filename="{path.split("/")[-1]}";'
    if file.lfs:
        headers |= {"X-Linked-Etag": f'"{file.sha256}"', "X-Linked-Size": str(total)}
    if wanted := re.fullmatch(r"bytes=(\d*)-(\d*)", request.headers.get("Range", "").replace(" ", "")):
        first, last = wanted.groups()
        start = int(first) if first else max(total - int(last or 0), 0)
        stop = min(int(last) + 1, total) if first and last else total
        if start >= total or stop <= start:
            request.extra_headers = {"Content-Range": f"bytes */{total}"}
            raise HubError(416, "Range Not Satisfiable")
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{total}"
        return 206, content[start:stop], headers
    return 200, content, headers


# Branches, tags, pull requests


def create_branch(request):
    repo, name, body = request.repo(write=True), request.args["rev"], request.json()
    if name in repo.branches:
        raise HubError(409, f"Reference already exists: refs/heads/{name}")
    repo.branches[name] = repo.resolve(body.get("startingPoint") or "main").id
    return 200, {}


def delete_branch(request):
    repo, name = request.repo(write=True), request.args["rev"]
    if name == "main":
        raise HubError(403, "Cannot delete the default branch refs/heads/main")
    if repo.branches.pop(name, None) is None:
        raise HubError(404, f"Invalid rev id: refs/heads/{name}", "RevisionNotFound")
    return 200, {}


def create_tag(request):
    repo, tag = request.repo(write=True), request.json()["tag"]
    commit = repo.resolve(request.args["rev"])
    if tag in repo.tags:
        raise HubError(409, f"Tag reference exists already: refs/tags/{tag}")
    repo.tags[tag] = commit.id
    return 200, {}


def delete_tag(request):
    repo, tag = request.repo(write=True), request.args["rev"]
    if repo.tags.pop(tag, None) is None:
        raise HubError(404, f"Invalid rev id: refs/tags/{tag}", "RevisionNotFound")
    return 200, {}


def list_discussions(request):
    repo = request.repo()
    rows = [discussion_row(repo, row) for row in repo.discussions] if request.query.get("p", ["0"]) == ["0"] else []
    return 200, {"discussions": rows, "count": len(repo.discussions), "start": 0}


def discussion_row(repo, row):
    answer = {"num": row["num"], "title": row["title"], "author": {"name": row["author"]}, "createdAt": row["created"]}
    answer |= {"status": row["status"], "isPullRequest": row["pull"], "events": [], "diff": ""}
    answer |= {"repo": {"name": repo.id, "type": repo.kind}, "filesWithConflicts": []}
    return answer | {"changes": {"base": f"refs/heads/{row['base']}", "mergeCommitId": row["merged"]}}


def create_discussion(request):
    repo, body = request.repo(), request.json()
    if request.user is None:
        raise HubError(401, "Invalid username or password.")
    head = repo.branches["main"] if body.get("pullRequest") else None
    return 200, {"num": repo.open_discussion(body["title"], request.user.name, head)}


def discussion(request):
    repo, number = request.repo(), int(request.args["num"])
    if not 1 <= number <= len(repo.discussions):
        raise HubError(404, "Discussion not found")
    return 200, discussion_row(repo, repo.discussions[number - 1])


def merge_discussion(request):
    repo, number = request.repo(write=True), int(request.args["num"])
    if str(number) not in repo.pulls or repo.discussions[number - 1]["status"] != "open":
        raise HubError(400, "This pull request is not open")
    repo.merge(number, request.user.name)
    return 200, {}


def close_discussion(request):
    repo, number = request.repo(write=True), int(request.args["num"])
    repo.discussions[number - 1]["status"] = request.json()["status"]
    event = {"id": secrets.token_hex(8), "type": "status-change", "createdAt": now()}
    event |= {"author": {"name": request.user.name}, "data": {"status": request.json()["status"]}}
    return 200, {"newStatus": event}


# Uploads


def writable(request, create_pr):
    """The repository of an upload: whoever may read it and has a write token may propose changes to it."""
    repo = request.repo()
    if request.user is None:
        raise HubError(401, "Invalid username or password.")
    if request.user.role != "write":
        raise HubError(403, "Forbidden: you must use a write token to upload to a repository")
    if not create_pr and repo.id.split("/")[0] not in (request.user.name, *request.user.orgs):
        raise HubError(403, "Forbidden: pass `create_pr=1` as a query parameter to create a Pull Request")
    return repo


def preupload(request):
    repo = writable(request, request.flag("create_pr"))
    files, body = repo.resolve(request.args["rev"]).files, request.json()
    ignored = body.get("gitIgnore")
    if ignored is None and ".gitignore" in files:
        ignored = files[".gitignore"].content.decode()
    patterns = [line.strip() for line in (ignored or "").splitlines() if line.strip() and not line.startswith("#")]
    rows = []
    for row in body["files"]:
        path = row["path"]
        sample, size = base64.b64decode(row.get("sample", "")), row["size"]
        lfs = size > 0 and (path.endswith(LFS_SUFFIXES) or size > LFS_ABOVE or b"\0" in sample)
        old = files.get(path)
        oid = old.etag if old is not None and old.lfs == lfs else None
        answer = {"path": path, "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": is_ignored(path, patterns)}
        rows.append(answer | ({} if oid is None else {"oid": oid}))
    return 200, {"files": rows}


def is_ignored(path, patterns):
    """Names, globs of one part, and folders with a slash behind: as much of .gitignore as tests write."""
    parts = path.split("/")
    for pattern in patterns:
        glob = re.escape(pattern.strip("/")).replace(r"\*", "[^/]*")
        candidates = [path, *parts[:-1]] if pattern.endswith("/") else [path, *parts]
        if any(re.fullmatch(glob, part) for part in candidates):
            return True
    return False


def lfs_batch(request):
    body, answers = request.json(), []
    repo = request.repo()
    if request.user is None or request.user.role != "write":
        raise HubError(403, "Authorization error.")
    for row in body["objects"]:
        oid, size = row["oid"], row["size"]
        answer = {"oid": oid, "size": size}
        if oid not in repo.lfs:
            href = f"{request.hub.endpoint}/lfs-storage/{repo.path}/{oid}"
            verify = {"href": f"{request.hub.endpoint}/{repo.path}.git/info/lfs/objects/verify", "header": {}}
            granted, chunk, header = request.hub.grant(repo, oid, size), request.hub.chunk_size, {}
            if chunk is not None and size > chunk and "multipart" in body.get("transfers", []):
                header = {str(part + 1): f"{href}/{part + 1}?signature={granted}" for part in range(-(-size // chunk))}
                header["chunk_size"] = str(chunk)
                href += "/complete"
            answer["actions"] = {"upload": {"href": f"{href}?signature={granted}", "header": header}, "verify": verify}
        answers.append(answer)
    return 200, {"transfer": "basic", "objects": answers}


def granted_upload(request):
    """The repository and size that the link was signed for. No token comes with it, as with any storage's link."""
    grant = request.hub.grants.get(request.query.get("signature", [""])[0])
    if grant is None or grant[1] != request.args["oid"]:
        raise HubError(403, "SignatureDoesNotMatch")
    return grant


def keep(request, repo, oid, size, content):
    if len(content) != size or hashlib.sha256(content).hexdigest() != oid:
        raise HubError(400, f"BadDigest: {len(content)} bytes came that are not the {size} of {oid}")
    request.hub.uploaded_bytes += size
    repo.lfs[oid] = content


def put_lfs(request):
    repo, oid, size = granted_upload(request)
    keep(request, repo, oid, size, request.body)
    return 200, b"", {"ETag": f'"{hashlib.md5(request.body).hexdigest()}"'}


def put_lfs_part(request):
    repo, oid, size = granted_upload(request)
    request.hub.parts.setdefault((repo.path, oid), {})[int(request.args["part"])] = request.body
    return 200, b"", {"ETag": f'"{hashlib.md5(request.body).hexdigest()}"'}


def complete_lfs(request):
    repo, oid, size = granted_upload(request)
    parts = request.hub.parts.pop((repo.path, oid), {})
    for row in request.json()["parts"]:
        if row["etag"] != f'"{hashlib.md5(parts.get(row["partNumber"], b"")).hexdigest()}"':
            raise HubError(400, f"InvalidPart: {row['partNumber']}")
    keep(request, repo, oid, size, b"".join(content for _, content in sorted(parts.items())))
    return 200, {}


def lfs_verify(request):
    repo, body = request.repo(), request.json()
    if len(repo.lfs.get(body["oid"], b"")) != body["size"] or body["oid"] not in repo.lfs:
        raise HubError(404, "The uploaded object is missing or has another size")
    return 200, {}


def commit(request):
    create_pr = request.flag("create_pr")
    repo = writable(request, create_pr)
    operations = [json.loads(line) for line in request.body.splitlines() if line.strip()]
    header, operations, received = operations[0]["value"], operations[1:], 0
    for operation in operations:
        value = operation["value"]
        if operation["key"] == "file":
            value["content"] = base64.b64decode(value["content"])
            received += len(value["content"])
        if operation["key"] == "file" and value["path"] == "README.md":
            errors, _ = check_card(value["content"].decode(errors="replace"), repo.kind)
            if errors:
                rows = [{"message": error} for error in errors]
                raise HubError(400, "Invalid metadata in README.md", errors=rows)
    made, number = repo.commit(
        request.args["rev"],
        operations,
        header["summary"],
        header.get("description", ""),
        request.user.name,
        header.get("parentCommit"),
        create_pr,
    )
    request.hub.uploaded_bytes += received
    url = f"{request.hub.endpoint}/{repo.path}"
    answer = {"success": True, "commitOid": made.id, "commitUrl": f"{url}/commit/{made.id}", "hookOutput": ""}
    return 200, answer | ({} if number is None else {"pullRequestUrl": f"{url}/discussions/{number}"})


API = r"/api/(?P<kinds>models|datasets|spaces)"
REPO = API + r"/(?P<id>[^/]+(?:/[^/]+)?)"
FILE = r"(?:/(?P<kinds>datasets|spaces))?/(?P<id>[^/]+(?:/[^/]+)?)"
REV = r"/(?P<rev>[^/]+)"
NUM = r"/discussions/(?P<num>\d+)"
STORED = r"/lfs-storage/.+/(?P<oid>[0-9a-f]{64})"

ROUTES = [
    ("GET", "/api/whoami-v2", whoami),
    ("GET", "/api/agent-harnesses", agent_harnesses),
    ("HEAD", "/api/telemetry/.*", telemetry),
    ("POST", "/api/validate-yaml", validate_yaml),
    ("POST", "/api/repos/create", create_repo),
    ("DELETE", "/api/repos/delete", delete_repo),
    ("POST", "/api/repos/move", move_repo),
    ("GET", API, list_repos),
    ("PUT", REPO + "/settings", settings),
    ("GET", REPO + "/revision" + REV, repo_info),
    ("GET", REPO + "/tree" + REV + "(?:/(?P<path>.+))?", tree),
    ("POST", REPO + "/paths-info" + REV, paths_info),
    ("GET", REPO + "/refs", refs),
    ("GET", REPO + "/commits" + REV, commits),
    ("POST", REPO + "/branch" + REV, create_branch),
    ("DELETE", REPO + "/branch" + REV, delete_branch),
    ("POST", REPO + "/tag" + REV, create_tag),
    ("DELETE", REPO + "/tag" + REV, delete_tag),
    ("GET", REPO + "/discussions", list_discussions),
    ("POST", REPO + "/discussions", create_discussion),
    ("GET", REPO + NUM, discussion),
    ("POST", REPO + NUM + "/merge", merge_discussion),
    ("POST", REPO + NUM + "/status", close_discussion),
    ("POST", REPO + "/preupload" + REV, preupload),
    ("POST", REPO + "/commit" + REV, commit),
    ("GET", REPO, repo_info),
    ("POST", FILE + r"\.git/info/lfs/objects/batch", lfs_batch),
    ("POST", FILE + r"\.git/info/lfs/objects/verify", lfs_verify),
    ("PUT", STORED, put_lfs),
    ("PUT", STORED + r"/(?P<part>\d+)", put_lfs_part),
    ("POST", STORED + "/complete", complete_lfs),
    *COLLECTION_ROUTES,
    ("GET", FILE + "/resolve" + REV + "/(?P<path>.+)", resolve),
    ("HEAD", FILE + "/resolve" + REV + "/(?P<path>.+)", resolve),
    # `datasets` and `HfFileSystem` ask for files below the API.
    ("GET", REPO + "/resolve" + REV + "/(?P<path>.+)", resolve),
    ("HEAD", REPO + "/resolve" + REV + "/(?P<path>.+)", resolve),
]
