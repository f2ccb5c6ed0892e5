"""Reports on results of `kveval quality`: docs/quality.json, docs/quality.md and its pictures.

    rows.py         result files in, rows in a stable order out; who is who among methods
    measures.py     means, interpolation, rank correlation, the binomial test
    comparisons.py  one method against another: at equal tokens, at equal quality
    goals.py        the list of goals, each with what was measured
    markdown.py     numbers and tables as text
    sections_*.py   the questions of docs/quality.md, one function each
    pictures.py     data of the pictures, and the drawing of them

Everything but the drawing needs Python alone.
"""
