"""Scenes: a world small enough to learn and exact enough to judge.

A scene is a small program with a picture. Data never runs out, held-out combinations are well
defined, and every answer, drawing and edit can be judged exactly.

    world.py      what a scene is: things on a background, its facts
    sample.py     scenes at random: where things stand, and which scenes are allowed
    render.py     a scene as a picture
    language.py   a scene in words, and words as facts
    tasks.py      questions, edits, several pictures, conversations
    splits.py     which scenes training never sees
    dataset.py    pools and streams of documents, on disk and in memory
"""
