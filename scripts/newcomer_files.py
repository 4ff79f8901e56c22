"""The mixed folder of `make newcomer`: files of many kinds as people have them, with invented facts to ask about."""

import random
import zipfile
from pathlib import Path

HTML = """<!DOCTYPE html><html><head><title>Orsa bakery</title><script>var price = 9;</script></head><body>
<nav>Home | Shop | About</nav><h1>The bakery of Orsa</h1>
<p>The bakery of Orsa was opened in 1911 by Henrik Lund, who had been a ship's cook for eleven years.</p>
<h2>Opening hours</h2><p>It opens at six and is closed on Mondays. A loaf of rye bread costs four crowns.</p>
<p>Its cellar is older than the house: the sour dough is kept there in clay pots, and fed on Sundays.</p>
</body></html>"""
WORD = [
    "Minutes of the allotment society, 12 May",
    "The chairman, Walter Pike, opened the meeting at seven. Nineteen members were present.",
    "The society bought a steel water tank for 340 pounds. It will stand beside the tool shed.",
    "Rose Adler was chosen as the new treasurer. She follows Tom Finch, who moves to the coast in June.",
]
PAGES = [
    "The Kestrel weather station stands on the northern ridge of Mount Arden, at 1,840 metres.",
    "Its wind gauge was replaced in 2009 after a lightning strike. The station is served by two observers, "
    "Maria Toll and Jan Berg, who change places every fortnight.",
]
LATIN = (
    "Die Fähre heißt nach der Müllerin: the ferry Müllerin crosses the river Elme between Göhren and Süderbrück. "
    "It was built in 1934 and carries six cars. The crossing takes nine minutes, and the ferryman is Jürgen Weiß."
)
MARKDOWN = """# The clock of Tarrin

The tower clock of Tarrin was made by the watchmaker Ilse Brandt. It was finished in 1926 and has a single hand.

## Care

- The clock is wound by hand every Thursday.
- Its bell weighs 210 kilograms and was cast in Sarn.
"""
FACT = (
    "On 14 March the barque Meridian came in from Porto with ninety casks of lamp oil for the chandler Edwin Marsh, "
    "who paid for them in silver. Her captain, Louisa Grey, stayed for three days and sailed with dried cod."
)
VESSELS = "brig Alder, schooner Wren, ketch Dunlin, sloop Heron, cutter Petrel, barge Thrush, lugger Plover".split(
    ", "
)
GOODS = "salt, coal, slate, timber, wool, barley, hides, bricks, rope, tar, oats, lime, iron, glass".split(", ")
PORTS = "Halden, Brixby, Torne, Selwick, Ruan, Oster, Millport, Garrow, Stenness, Lyme".split(", ")
WINDS = "a light wind from the west, fog until noon, heavy rain, a calm sea, snow on the quay, a gale at night".split(
    ", "
)

# (question, accepted answers; none: no file says it)
QUESTIONS = (
    ("Who opened the bakery of Orsa?", ["Henrik Lund"]),
    ("How much does a loaf of rye bread cost?", ["four crowns", "4 crowns"]),
    ("Who was chosen as the new treasurer?", ["Rose Adler"]),
    ("What did the society pay for the water tank?", ["340 pounds", "340"]),
    ("When was the wind gauge of the Kestrel station replaced?", ["2009"]),
    ("How long does the crossing of the ferry take?", ["nine minutes", "9 minutes"]),
    ("Who made the tower clock of Tarrin?", ["Ilse Brandt"]),
    ("What did the barque Meridian bring from Porto?", ["lamp oil"]),
    ("What is the capital of France?", []),
    ("Who designed the bridge over the river Elme?", []),
    ("How much does the water tank weigh?", []),
    ("Which prize did Ilse Brandt win?", []),
)


def logbook(words: int) -> str:
    """A harbour master's log of about so many words; in its middle stands `FACT`."""
    draw, entries, count, day = random.Random(0), [], 0, 0
    while count < words:
        day += 1
        lines = [f"Day {day}: {draw.choice(WINDS)}."]
        for vessel in draw.sample(VESSELS, 3):
            goods, port, number = draw.choice(GOODS), draw.choice(PORTS), draw.randrange(10, 90)
            lines.append(f"The {vessel} arrived from {port} with {number} tons of {goods}, and left on the next tide.")
        dusk = f"{draw.randrange(2, 9)} boats were in the harbour at dusk."
        lines.append(FACT if count <= words // 2 < count + 60 else dusk)
        entries.append(" ".join(lines))
        count += len(entries[-1].split())
    return "\n\n".join(entries)


def docx(paragraphs: list[str], path: Path) -> None:
    """A Word file of plain paragraphs."""
    space, mime = "http://schemas.openxmlformats.org", "application/vnd.openxmlformats"
    body = "".join(f"<w:p><w:r><w:t>{text}</w:t></w:r></w:p>" for text in paragraphs)
    main, relation = f"{space}/wordprocessingml/2006/main", f"{space}/officeDocument/2006/relationships/officeDocument"
    parts = {
        "[Content_Types].xml": f'<Types xmlns="{space}/package/2006/content-types">'
        f'<Default Extension="rels" ContentType="{mime}-package.relationships+xml"/><Override '
        f'PartName="/word/document.xml" ContentType="{mime}-officedocument.wordprocessingml.document.main+xml"/>'
        "</Types>",
        "_rels/.rels": f'<Relationships xmlns="{space}/package/2006/relationships">'
        f'<Relationship Id="r1" Type="{relation}" Target="word/document.xml"/></Relationships>',
        "word/document.xml": f'<w:document xmlns:w="{main}"><w:body>{body}</w:body></w:document>',
    }
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in parts.items():
            archive.writestr(name, f'<?xml version="1.0" encoding="UTF-8"?>{content}')


def pdf(pages: list[str], path: Path) -> None:
    """A PDF with a line of text a page."""
    numbers = range(4, 4 + 2 * len(pages), 2)
    objects = {
        1: b"<< /Type /Catalog /Pages 2 0 R >>",
        2: f"<< /Type /Pages /Kids [{' '.join(f'{n} 0 R' for n in numbers)}] /Count {len(pages)} >>".encode(),
        3: b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    }
    for number, text in zip(numbers, pages, strict=True):
        stream = f"BT /F1 8 Tf 40 720 Td ({text}) Tj ET".encode()
        resources = f"/MediaBox [0 0 900 792] /Resources << /Font << /F1 3 0 R >> >> /Contents {number + 1} 0 R"
        objects[number] = f"<< /Type /Page /Parent 2 0 R {resources} >>".encode()
        objects[number + 1] = b"<< /Length %d >>\nstream\n%s\nendstream" % (len(stream), stream)
    content, offsets = b"%PDF-1.4\n", []
    for number, body in sorted(objects.items()):
        offsets.append(len(content))
        content += b"%d 0 obj\n%s\nendobj\n" % (number, body)
    table = b"".join(b"%010d 00000 n \n" % offset for offset in offsets)
    size, start = len(objects) + 1, len(content)
    content += b"xref\n0 %d\n0000000000 65535 f \n%strailer << /Size %d /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF" % (
        size,
        table,
        size,
        start,
    )
    path.write_bytes(content)


def make_files(folder: Path, words: int = 20_000) -> None:
    """Fill `folder`; the log has about so many words."""
    folder.mkdir(parents=True)
    (folder / "bakery.html").write_text(HTML)
    docx(WORD, folder / "minutes.docx")
    pdf(PAGES, folder / "station.pdf")
    (folder / "ferry.txt").write_bytes(LATIN.encode("latin-1"))
    (folder / "clock.md").write_text(MARKDOWN)
    (folder / "log.txt").write_text(logbook(words))
    (folder / "empty.txt").write_bytes(b"")
    (folder / "photo.jpg").write_bytes(b"\xff\xd8\xff\xe0" + bytes(range(256)))
    (folder / "data.txt").write_bytes(bytes(range(256)) * 64)
