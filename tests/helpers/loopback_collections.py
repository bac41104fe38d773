"""The endpoints of collections; see `loopback_routes`."""

import re
import secrets

from loopback_store import KINDS, HubError, now


def show_collection(found):
    items = [item | {"position": place} for place, item in enumerate(found["items"])]
    return {key: value for key, value in found.items() if key != "items"} | {"items": items}


def create_collection(request):
    body, store = request.json(), request.store
    store.may_write(request.user, body["namespace"])
    name = re.sub("[^a-z0-9]+", "-", body["title"].lower()).strip("-")
    for slug, found in store.collections.items():
        if found["title"] == body["title"] and found["owner"]["name"] == body["namespace"]:
            raise HubError(409, "A collection with this title exists already", slug=slug)
    slug = f"{body['namespace']}/{name}-{secrets.token_hex(12)}"
    owner = {"name": body["namespace"], "type": "user" if body["namespace"] == request.user.name else "org"}
    found = {"slug": slug, "title": body["title"], "description": body.get("description"), "owner": owner}
    found |= {"private": bool(body.get("private")), "theme": "orange", "position": len(store.collections)}
    store.collections[slug] = found | {"upvotes": 0, "lastUpdated": now(), "items": []}
    return 200, show_collection(store.collections[slug])


def list_collections(request):
    owner = request.query.get("owner", [None])[0]
    rows = []
    for found in request.store.collections.values():
        name = found["owner"]["name"]
        visible = not found["private"] or (request.user and name in (request.user.name, *request.user.orgs))
        if visible and owner in (None, name):
            rows.append(show_collection(found))
    return 200, rows


def get_collection(request):
    return 200, show_collection(request.store.collection(request.user, request.args["slug"]))


def update_collection(request):
    found = request.store.collection(request.user, request.args["slug"], write=True)
    found |= {**request.json(), "lastUpdated": now()}
    return 200, {"success": True, "data": show_collection(found)}


def delete_collection(request):
    request.store.collection(request.user, request.args["slug"], write=True)
    del request.store.collections[request.args["slug"]]
    return 200, {}


def add_item(request):
    found, body = request.store.collection(request.user, request.args["slug"], write=True), request.json()
    item = body["item"]
    if item["type"] in KINDS.values():
        request.store.repo(request.user, item["type"], item["id"])
    if any((row["id"], row["type"]) == (item["id"], item["type"]) for row in found["items"]):
        raise HubError(409, "This item is already in the collection")
    note = {} if body.get("note") is None else {"note": {"text": body["note"], "html": body["note"]}}
    found["items"].append({"_id": secrets.token_hex(12), "id": item["id"], "type": item["type"]} | note)
    return 200, show_collection(found)


def find_item(request):
    found = request.store.collection(request.user, request.args["slug"], write=True)
    for item in found["items"]:
        if item["_id"] == request.args["item"]:
            return found["items"], item
    raise HubError(404, "Item not found in the collection")


def update_item(request):
    (items, item), body = find_item(request), request.json()
    if "note" in body:
        item["note"] = {"text": body["note"], "html": body["note"]}
    if "position" in body:
        items.remove(item)
        items.insert(body["position"], item)
    return 200, {"success": True}


def delete_item(request):
    items, item = find_item(request)
    items.remove(item)
    return 200, {"success": True}


COLLECTION = r"/api/collections/(?P<slug>[^/]+/[^/]+)"

COLLECTION_ROUTES = [
    ("POST", "/api/collections", create_collection),
    ("GET", "/api/collections", list_collections),
    ("POST", COLLECTION + "/items", add_item),
    ("PATCH", COLLECTION + "/items/(?P<item>[^/]+)", update_item),
    ("DELETE", COLLECTION + "/items/(?P<item>[^/]+)", delete_item),
    ("GET", COLLECTION, get_collection),
    ("PATCH", COLLECTION, update_collection),
    ("DELETE", COLLECTION, delete_collection),
]
