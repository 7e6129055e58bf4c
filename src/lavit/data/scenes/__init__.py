"""Scenes: a world small enough to learn and exact enough to judge.

A scene is a small program with a picture. Data never runs out, held-out combinations are well
defined, and every answer, drawing and edit can be judged exactly.

    world.py      what a scene is: things on a background, its facts
    sample.py     scenes at random: where things stand, and which scenes are allowed
    render.py     a scene as a picture
    language.py   a scene in words; parse.py: words as facts; lexicon.py: the words
    questions.py  questions and their answers; edits.py: edits
    tasks.py      several pictures, conversations
    splits.py     which scenes and documents training never sees
    frozen.py     whether the test sets are still those of published figures
    chance.py     choices at random
    dataset.py    pools and streams of documents, on disk and in memory
"""
