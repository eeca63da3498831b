"""One small log written in every raw format, and the expected result of `prepare`."""

import gzip
import json
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq


class Row(NamedTuple):
    user: int
    item: int
    time: int
    rating: float


# Not in chronological order, with ties (user 7 at 40) and duplicates (user 7 with item 20, user 11 with item 30).
LOG = [
    Row(11, 30, 50, 4.0),
    Row(7, 20, 40, 5.0),
    Row(7, 10, 40, 1.0),
    Row(7, 30, 10, 4.0),
    Row(7, 20, 60, 2.0),
    Row(11, 20, 20, 3.0),
    Row(3, 40, 30, 5.0),
    Row(11, 30, 51, 5.0),
    Row(11, 10, 55, 5.0),
]
TITLES = {10: "Tom & Jerry (1999)", 20: "Émile", 30: "Pen, blue", 99: "Nobody's"}
CATEGORY_NUMBERS = {"Comedy": 3, "Drama": 17}
CATEGORIES = {10: ["Comedy", "Drama"], 20: ["Drama"], 30: [], 99: ["Comedy"]}


def prepared(log, k=None, min_rating=None, duplicates="first") -> tuple[dict, int]:
    """Return the expected {user: items}, computed with dictionaries and loops, and the number of duplicates."""
    rows = [row for row in log if min_rating is None or row.rating >= min_rating]
    sequences = {user: [] for user in sorted({row.user for row in rows})}
    for row in sorted(rows, key=lambda row: row.time):  # stable
        sequences[row.user].append(row.item)
    repeated = sum(len(items) - len(set(items)) for items in sequences.values())
    for user, items in sequences.items():
        if duplicates == "first":
            sequences[user] = list(dict.fromkeys(items))
        elif duplicates == "last":
            sequences[user] = list(dict.fromkeys(reversed(items)))[::-1]
    while k is not None:
        taken = Counter(item for items in sequences.values() for item in items)
        filtered = {user: [item for item in items if taken[item] >= k] for user, items in sequences.items()}
        filtered = {user: items for user, items in filtered.items() if len(items) >= k}
        if filtered == sequences:
            break
        sequences = filtered
    return {user: items for user, items in sequences.items() if items}, repeated


def write(path: Path, text: str, encoding="utf-8", packed=False) -> Path:
    content = text.encode(encoding)
    path.write_bytes(gzip.compress(content) if packed else content)
    return path


def write_lines(path: Path, lines, **options) -> Path:
    return write(path, "".join(f"{line}\n" for line in lines), **options)


def write_json_lines(path: Path, rows, **options) -> Path:
    return write_lines(path, map(json.dumps, rows), **options)


def amazon(folder: Path, packed: bool, literal=False) -> tuple[Path, Path]:
    reviews = [
        {
            "reviewerID": str(row.user),
            "asin": str(row.item),
            "reviewText": "so\nso",
            "overall": row.rating,
            "unixReviewTime": row.time,
        }
        for row in LOG
    ]
    meta = [
        {"asin": str(i), "title": TITLES[i].replace("&", "&amp;"), "categories": [CATEGORIES[i], CATEGORIES[i][:1]]}
        for i in TITLES
    ]
    return (
        write_json_lines(folder / "reviews_Toy_5.json.gz", reviews, packed=packed),
        write_lines(folder / "meta_Toy.json.gz", map(repr if literal else json.dumps, meta), packed=packed),
    )


def amazon_2014(folder, packed):
    return amazon(folder, packed, literal=True)


def amazon_ratings(order):
    def write_ratings(folder, packed):
        rows = [{"user": row.user, "item": row.item, "rating": row.rating, "timestamp": row.time} for row in LOG]
        lines = [",".join(str(row[name]) for name in order) for row in rows]
        return write_lines(folder / "ratings_Toy.csv", lines, packed=packed), amazon(folder, packed)[1]

    return write_ratings


def amazon_2023_csv(folder, packed):
    header = "user_id,parent_asin,rating,timestamp,history"
    rows = [f"{row.user},{row.item},{row.rating},{row.time},1 2 3" for row in LOG]
    meta = [{"parent_asin": str(i), "title": TITLES[i], "categories": CATEGORIES[i]} for i in TITLES]
    return (
        write_lines(folder / "Toy.csv", [header, *rows], packed=packed),
        write_json_lines(folder / "meta.jsonl", meta, packed=packed),
    )


def amazon_2023_jsonl(folder, packed):
    rows = [
        {"user_id": str(row.user), "asin": "x", "parent_asin": str(row.item), "rating": row.rating}
        | {"timestamp": row.time}
        for row in LOG
    ]
    _, items = amazon_2023_csv(folder, packed)
    return write_json_lines(folder / "Toy.jsonl", rows, packed=packed), items


def movielens_csv(folder, packed):
    rows = [f"{row.user},{row.item},{row.rating},{row.time}" for row in LOG]
    movies = [f'{i},"{TITLES[i]}",{"|".join(CATEGORIES[i]) or "(no genres listed)"}' for i in TITLES]
    return (
        write_lines(folder / "ratings.csv", ["userId,movieId,rating,timestamp", *rows], packed=packed),
        write_lines(folder / "movies.csv", ["movieId,title,genres", *movies], packed=packed),
    )


def movielens_dat(folder, packed):
    rows = [f"{row.user}::{row.item}::{row.rating}::{row.time}" for row in LOG]
    movies = [f"{i}::{TITLES[i]}::{'|'.join(CATEGORIES[i])}" for i in TITLES]
    return (
        write_lines(folder / "ratings.dat", rows, packed=packed),
        write_lines(folder / "movies.dat", movies, encoding="latin-1", packed=packed),
    )


def movielens_100k(folder, packed):
    rows = [f"{row.user}\t{row.item}\t{row.rating:.0f}\t{row.time}" for row in LOG]
    flags = {"Comedy": 5, "Drama": 8}  # positions in u.genre
    movies = [
        f"{i}|{TITLES[i]}|01-Jan-1995||http://x|"
        + "|".join("1" if flag in {flags[name] for name in CATEGORIES[i]} else "0" for flag in range(19))
        for i in TITLES
    ]
    return (
        write_lines(folder / "u.data", rows, packed=packed),
        write_lines(folder / "u.item", movies, encoding="latin-1", packed=packed),
    )


def recbole(folder, packed):
    rows = [f"{row.user}\t{row.item}\t{row.rating}\t{row.time}" for row in LOG]
    movies = [f"{i}\t{TITLES[i]}\t{' '.join(CATEGORIES[i])}" for i in TITLES]
    header = "user_id:token\titem_id:token\trating:float\ttimestamp:float"
    return (
        write_lines(folder / "toy.inter", [header, *rows], packed=packed),
        write_lines(folder / "toy.item", ["item_id:token\tmovie_title:token_seq\tclass:token_seq", *movies]),
    )


def csv(folder, packed):
    rows = [f"{row.time};{row.user};{row.item};{row.rating}\r" for row in LOG]
    items = [f'"{TITLES[i]}",{i},"{", ".join(CATEGORIES[i])}"' for i in TITLES]
    return (
        write_lines(folder / "log.csv", ["timestamp;user_id;item_id;rating\r", *rows], packed=packed),
        write_lines(folder / "items.csv", ["title,item_id,categories", *items], packed=packed),
    )


def jsonl(folder, packed):
    rows = [{"user_id": row.user, "item_id": row.item, "timestamp": row.time, "rating": row.rating} for row in LOG]
    items = [{"item_id": i, "title": TITLES[i], "categories": CATEGORIES[i]} for i in TITLES]
    return (
        write_json_lines(folder / "log.jsonl", rows, packed=packed),
        write_json_lines(folder / "items.jsonl", items, packed=packed),
    )


def parquet(folder, packed):
    users, bought, times, ratings = map(list, zip(*LOG, strict=True))
    log = {"user_id": users, "item_id": map(str, bought), "timestamp": pa.array(times, pa.timestamp("ns"))}
    items = {"item_id": list(TITLES), "title": list(TITLES.values()), "categories": list(CATEGORIES.values())}
    pq.write_table(pa.table({**log, "item_id": list(log["item_id"]), "rating": ratings}), folder / "log.parquet")
    pq.write_table(pa.table(items), folder / "items.parquet")
    return folder / "log.parquet", folder / "items.parquet"


def table(folder, packed):
    return tuple(map(pq.read_table, parquet(folder, packed)))


def s3rec(folder, packed):
    sequences, _ = prepared(LOG, duplicates="keep")
    attributes = {i: [CATEGORY_NUMBERS[name] for name in names] for i, names in CATEGORIES.items()}
    write(folder / "Toy_item2attributes.json", json.dumps(attributes))  # found by its name
    return write_lines(folder / "Toy.txt", [" ".join(map(str, (u, *i))) for u, i in sequences.items()]), None


def letter(folder, packed):
    sequences, _ = prepared(LOG, duplicates="keep")
    write(folder / "Toy.inter.json", json.dumps(sequences))
    items = {i: {"title": TITLES[i].replace("&", "&amp;"), "categories": CATEGORIES[i]} for i in TITLES}
    write(folder / "Toy.item.json", json.dumps(items))
    write(folder / "Toy.index.json", json.dumps({str(item): [f"<a_{item}>"] for item in (*TITLES, 40)}))
    return folder, None


def folder(folder, packed):
    sequences, _ = prepared(LOG, duplicates="keep")
    write_json_lines(folder / "sequences.jsonl", [{"user": user, "items": items} for user, items in sequences.items()])
    items = [{"item": i, "title": TITLES[i], "categories": ", ".join(CATEGORIES[i])} for i in TITLES]
    write_json_lines(folder / "items.jsonl", items)
    return folder, None


#: name of the case -> (format, writer)
WRITERS = {
    "amazon-2014": ("amazon-2014", amazon_2014),
    "amazon-2014 ratings": ("amazon-2014", amazon_ratings(("user", "item", "rating", "timestamp"))),
    "amazon-2018": ("amazon-2018", amazon),
    "amazon-2018 ratings": ("amazon-2018", amazon_ratings(("item", "user", "rating", "timestamp"))),
    "amazon-2023 csv": ("amazon-2023", amazon_2023_csv),
    "amazon-2023 jsonl": ("amazon-2023", amazon_2023_jsonl),
    "movielens csv": ("movielens", movielens_csv),
    "movielens dat": ("movielens", movielens_dat),
    "movielens 100k": ("movielens", movielens_100k),
    "recbole": ("recbole", recbole),
    "csv": ("csv", csv),
    "jsonl": ("jsonl", jsonl),
    "parquet": ("parquet", parquet),
    "table": ("table", table),
    "s3rec": ("s3rec", s3rec),
    "letter": ("letter", letter),
    "folder": ("folder", folder),
}
