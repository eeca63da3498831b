"""MovieLens: `ratings.csv` and `movies.csv`, `ratings.dat` and `movies.dat`, or `u.data` and `u.item` of ml-100k."""

from .format import Format, Header, Parsed, Request, Table
from .source import Source


# The order of the flags in u.item, from u.genre.
# fmt: off
_GENRES = (
    "unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime",
    "Documentary", "Drama", "Fantasy", "Film-Noir", "Horror", "Musical",
    "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western",
)
# fmt: on
_NO_GENRE = ("unknown", "(no genres listed)")
#: `ratings.dat` and `u.data`, which have no header.
_RATINGS = Table(("userId", "movieId", "rating", "timestamp"), wanted="instead of user, movie, rating and time")


def _ratings(source: Source, request: Request) -> Parsed:
    head = source.peek()
    names = request.names("userId", "movieId", "timestamp", "rating")
    if "::" in head:
        return _RATINGS.interactions(source, "::", names, _encoding(source), quoted=False)
    if "\t" in head:
        return _RATINGS.interactions(source, "\t", names, _encoding(source), quoted=False)
    return Header(source, ",", (*names[:3], "rating")).interactions(source, ",", names)


def _movies(source: Source, request: Request) -> Parsed:
    head = source.peek()
    if "::" in head:
        rows = ((number, line.split("::")) for number, line in source.numbered_lines(_encoding(source)))
        return Parsed(rows, _movie)
    if head.count("|") >= 23:
        return Parsed(source.csv_rows("|", _encoding(source), quoted=False), _flagged_movie)
    parse = Header(source, ",", ("movieId", "title", "genres")).items("movieId")

    def movie(fields: list[str]) -> tuple:
        item, row = parse(fields)
        return _movie([item, row["title"], row["genres"]])

    return Parsed(source.csv_rows(","), movie)


def _movie(fields: list[str]) -> tuple:
    if len(fields) != 3:
        raise ValueError(f"{len(fields)} fields instead of movie, title and genres")
    item, title, genres = fields
    return item, {"title": title, "categories": [genre for genre in genres.split("|") if genre not in _NO_GENRE]}


def _flagged_movie(fields: list[str]) -> tuple:
    if len(fields) != 5 + len(_GENRES):
        raise ValueError(f"{len(fields)} fields instead of the {5 + len(_GENRES)} of u.item")
    genres = [genre for genre, flag in zip(_GENRES, fields[5:], strict=True) if flag == "1" and genre not in _NO_GENRE]
    return fields[0], {"title": fields[1], "categories": genres}


def _encoding(source: Source) -> str:
    """Detect the encoding: ml-100k and ml-1m are latin-1, ml-10m is UTF-8. Latin-1 text is hardly ever valid UTF-8."""
    return "utf-8-sig" if source.encoding is None and source.is_utf8() else "latin-1"


MOVIELENS = Format(
    interactions=_ratings,
    expected="user, movie, rating and time: ratings.csv with its header, ratings.dat with '::', or u.data with tabs",
    items=_movies,
    expected_items="movies.csv with its header, movies.dat with '::', or u.item with '|'",
    files=("ratings.csv", "ratings.csv.gz", "ratings.dat", "u.data"),
    item_files=("movies.csv", "movies.csv.gz", "movies.dat", "u.item"),
)
