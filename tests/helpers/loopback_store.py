"""What the loopback Hub remembers: repositories as histories of commits, users, collections. All of it in memory."""

import hashlib
import itertools
import re
import secrets
from dataclasses import dataclass, field
from datetime import UTC, datetime

# The real Hub stores as LFS what its `.gitattributes` names and what is over 10 MB; files of tests are smaller.
LFS_ABOVE = 10_000
LFS_SUFFIXES = tuple(".safetensors .bin .pt .pth .npz .npy .png .jpg .parquet .arrow .gz .zip .h5 .onnx".split())
GITATTRIBUTES = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES).encode()

KINDS = {"models": "model", "datasets": "dataset", "spaces": "space"}


class HubError(Exception):
    """An answer that is an error: its status, its message and the code in `X-Error-Code` that the client goes by."""

    def __init__(self, status, message, code=None, **body):
        super().__init__(message)
        self.status, self.message, self.code, self.body = status, message, code, body


def now():
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def git_hash(content):
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass(frozen=True)
class User:
    name: str
    orgs: tuple = ()
    role: str = "write"


@dataclass(frozen=True)
class File:
    """One file of one commit. An LFS file's git object is a pointer, its ETag the SHA-256 of its content."""

    content: bytes = field(repr=False)
    lfs: bool

    @property
    def sha256(self):
        return hashlib.sha256(self.content).hexdigest()

    @property
    def pointer(self):
        lines = [
            "version https://git-lfs.github.com/spec/v1",
            f"oid sha256:{self.sha256}",
            f"size {len(self.content)}",
        ]
        return "".join(line + "\n" for line in lines).encode()

    @property
    def blob_id(self):
        return git_hash(self.pointer if self.lfs else self.content)

    @property
    def etag(self):
        return self.sha256 if self.lfs else self.blob_id


@dataclass(frozen=True)
class Commit:
    id: str
    parents: tuple
    title: str
    message: str
    author: str
    date: str
    files: dict = field(repr=False)


class Repo:
    """A repository: every commit that was ever made, and the names that point at some of them."""

    def __init__(self, kind, id, private=False, sdk=None, author="alice"):
        self.kind, self.id, self.private, self.sdk, self.gated = kind, id, private, sdk, False
        self.created = now()
        self.commits = {}
        self.branches, self.tags, self.pulls = {}, {}, {}
        self.discussions = []
        self.lfs = {}
        files = {".gitattributes": File(GITATTRIBUTES, False)}
        if kind == "space":
            card = f"---\ntitle: {id.split('/')[-1]}\nsdk: {sdk}\napp_file: app.py\npinned: false\n---\n"
            files["README.md"] = File(card.encode(), False)
        self.branches["main"] = self.add_commit((), "initial commit", "", author, files).id

    @property
    def path(self):
        """`alice/m`, `datasets/alice/d`, `spaces/alice/s`: the path behind the endpoint."""
        return self.id if self.kind == "model" else f"{self.kind}s/{self.id}"

    def add_commit(self, parents, title, message, author, files):
        files, date = dict(sorted(files.items())), now()
        digest = hashlib.sha1(repr((self.path, parents, title, message, author, date)).encode())
        for path, file in files.items():
            digest.update(f"{path}\0{file.blob_id}\n".encode())
        commit = Commit(digest.hexdigest(), tuple(parents), title, message, author, date, files)
        self.commits[commit.id] = commit
        return commit

    def names(self, revision):
        """The dictionary of names and the key that `revision` stands for, or `None` where it names no ref."""
        for prefix, refs in (("refs/heads/", self.branches), ("refs/tags/", self.tags), ("refs/pr/", self.pulls)):
            if revision.startswith(prefix) and revision.removeprefix(prefix) in refs:
                return refs, revision.removeprefix(prefix)
        for refs in (self.branches, self.tags):
            if revision in refs:
                return refs, revision
        return None

    def resolve(self, revision):
        """The commit that a branch, tag, pull request, full or shortened id names."""
        if named := self.names(revision):
            refs, key = named
            return self.commits[refs[key]]
        if re.fullmatch("[0-9a-f]{5,40}", revision):
            found = [id for id in self.commits if id.startswith(revision)]
            if len(found) == 1:
                return self.commits[found[0]]
        raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def history(self, revision):
        """Commits from `revision` back to the first, newest first, along first parents."""
        commit = self.resolve(revision)
        while True:
            yield commit
            if not commit.parents:
                return
            commit = self.commits[commit.parents[0]]

    def last_change(self, path, revision):
        """The commit that gave the file, or the files of the folder, what they are at `revision`."""

        def below(commit):
            return {name: f.blob_id for name, f in commit.files.items() if name == path or name.startswith(path + "/")}

        history = list(self.history(revision))
        for commit, parent in itertools.pairwise(history):
            if below(commit) != below(parent):
                return commit
        return history[-1]

    def entry(self, path, revision, expand=False):
        """The `tree` and `paths-info` row of a file or folder, `None` where there is neither."""
        files = self.resolve(revision).files
        if path in files:
            file = files[path]
            row = {"type": "file", "oid": file.blob_id, "size": len(file.content), "path": path}
            if file.lfs:
                row["lfs"] = {"oid": file.sha256, "size": len(file.content), "pointerSize": len(file.pointer)}
        elif any(name.startswith(path + "/") for name in files):
            below = "".join(f"{name} {files[name].blob_id}\n" for name in files if name.startswith(path + "/"))
            row = {"type": "directory", "oid": git_hash(below.encode()), "size": 0, "path": path}
        else:
            return None
        if expand:
            commit = self.last_change(path, revision)
            row["lastCommit"] = {"id": commit.id, "title": commit.title, "date": commit.date}
        return row

    def apply(self, files, operations):
        """The files after the operations of a commit; refuses what a commit of the real Hub is refused for."""
        files = dict(files)
        for operation in operations:
            key, value = operation["key"], operation["value"]
            path = value["path"]
            if path.startswith("/") or ".." in path.split("/") or ".git" in path.split("/"):
                raise HubError(400, f"Invalid path in commit: {path}")
            if key == "file":
                files[path] = File(value["content"], False)
            elif key == "lfsFile":
                if value["oid"] not in self.lfs:
                    raise HubError(400, "LFS pointer pointed to a file that does not exist", files=[path])
                files[path] = File(self.lfs[value["oid"]], True)
            elif key == "deletedFile":
                if path not in files:
                    raise HubError(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
                del files[path]
            elif key == "deletedFolder":
                inside = [name for name in files if name.startswith(path.rstrip("/") + "/")]
                if not inside:
                    raise HubError(404, f"A folder with this name doesn't exist: {path}", "EntryNotFound")
                for name in inside:
                    del files[name]
            elif key == "copyFile":
                source = self.resolve(value.get("srcRevision") or "main").files
                if value["srcPath"] not in source:
                    raise HubError(404, f"A file with this name doesn't exist: {value['srcPath']}", "EntryNotFound")
                files[path] = source[value["srcPath"]]
            else:
                raise HubError(400, f"Unknown operation in commit: {key}")
        return files

    def commit(self, revision, operations, title, message, author, parent=None, create_pr=False):
        """One commit on top of a branch or a pull request, or a pull request of its own. Returns it and the number."""
        named = self.names(revision)
        head = self.resolve(revision)
        if named is None or named[0] is self.tags:
            raise HubError(400, f"Cannot commit to {revision}: it is no branch")
        if parent is not None and not head.id.startswith(parent):
            raise HubError(412, "A commit has happened since. Please refresh and try again.")
        commit = self.add_commit((head.id,), title, message, author, self.apply(head.files, operations))
        if create_pr:
            return commit, self.open_discussion(title, author, commit.id, base=named[1])
        named[0][named[1]] = commit.id
        return commit, None

    def open_discussion(self, title, author, head=None, base="main"):
        number = len(self.discussions) + 1
        discussion = {"num": number, "title": title, "author": author, "status": "open", "created": now()}
        self.discussions.append(discussion | {"base": base, "pull": head is not None, "merged": None})
        if head is not None:
            self.pulls[str(number)] = head
        return number

    def merge(self, number, author):
        """What the pull request changed since it left its branch, as one commit on that branch."""
        discussion = self.discussions[number - 1]
        base, head = self.branches[discussion["base"]], self.commits[self.pulls[str(number)]]
        ours = {commit.id for commit in self.history(base)}
        fork = next((commit for commit in self.history(head.id) if commit.id in ours), None)
        old = fork.files if fork else {}
        files = {
            path: file for path, file in self.commits[base].files.items() if path in head.files or path not in old
        }
        files |= {path: file for path, file in head.files.items() if old.get(path) != file}
        title = f"{discussion['title']} (#{number})"
        commit = self.add_commit((base, head.id), title, "", author, files)
        self.branches[discussion["base"]] = commit.id
        discussion["status"], discussion["merged"] = "merged", commit.id


class Store:
    """Users by token, repositories by kind and id, collections by slug."""

    def __init__(self):
        self.users, self.repos, self.moved, self.collections = {}, {}, {}, {}

    def add_user(self, name, orgs=(), role="write"):
        """A token for `name`. It looks like a real one, and no two servers share one, so that a leak can be found."""
        token = "hf_" + secrets.token_hex(17)
        self.users[token] = User(name, tuple(orgs), role)
        return token

    def create(self, user, kind, id, private, sdk=None):
        self.may_write(user, id.split("/")[0], f"You don't have the rights to create a {kind} under the namespace ")
        if (kind, id) in self.repos:
            raise HubError(409, f"You already created this {kind} repo: {id}")
        self.moved.pop((kind, id), None)
        self.repos[kind, id] = Repo(kind, id, private, sdk, user.name)
        return self.repos[kind, id]

    def may_write(self, user, namespace, message="You don't have write access to "):
        if user is None:
            raise HubError(401, "Invalid username or password.")
        if namespace not in (user.name, *user.orgs):
            raise HubError(403, f'{message}"{namespace}"')
        if user.role != "write":
            raise HubError(403, "Forbidden: you must use a write token to upload to a repository")

    def repo(self, user, kind, id, write=False):
        """The repository if `user` may see it; a private one does not exist for anybody else, as on the real Hub."""
        id = self.moved.get((kind, id), id)
        repo = self.repos.get((kind, id))
        namespace = id.split("/")[0]
        if repo is None or (repo.private and (user is None or namespace not in (user.name, *user.orgs))):
            if user is None:
                raise HubError(401, "Invalid username or password.", "RepoNotFound")
            raise HubError(404, "Repository not found", "RepoNotFound")
        if write:
            self.may_write(user, namespace)
        return repo

    def collection(self, user, slug, write=False):
        found = self.collections.get(slug)
        owner = slug.split("/")[0]
        if found is None or (found["private"] and (user is None or owner not in (user.name, *user.orgs))):
            raise HubError(404, "Collection not found")
        if write:
            self.may_write(user, owner)
        return found
