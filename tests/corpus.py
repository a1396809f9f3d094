"""Eight short documents in the built-in model's language, and questions they answer."""

from __future__ import annotations

DOCUMENTS = (
    "Rhea Thaswright moved to Trudabad last year. She was born in Trudville. "
    "Rhea Thaswright enjoys kayaking. Rhea Thaswright earns a living as a painter.",
    "Trudabad lies on the river Jisune. Trudabad elected Zoe Barton as mayor. "
    "The meeting was moved to Monday.",
    "Report: Quartgen was founded in 1881. The photographs were taken in summer. "
    "Quartgen operates from Hasnes.",
    "Clara Nandham is on the staff of Quartgen. Clara Nandham uses extension 6422. "
    "Clara took up cricket last year.",
    "File: Shaltsoft is run by Tobias Brumpool. Shaltsoft is based in Primmouth. "
    "Shaltsoft was founded in 1971.",
    "Jerome Jartholt is fond of archery. He works for Monddyne.",
    "Record: Jerome Fertden answers the phone at extension 3672. Jerome Fertden works for "
    "Shaltsoft. Jerome Fertden was born in Gluvmouth. The doors close at six.",
    "File: Monddyne operates from Widheim. The garden behind the building is open in summer. "
    "Monddyne is known for its drills. Parking is free on Sunday. Monddyne was founded in 1868. "
    "It has a director named Winona Dersky.",
)

# question → the answer, and the documents that it takes
QUESTIONS = {
    "Who is the mayor of Trudabad?": ("Zoe Barton.", (1, 4)),
    "What does Monddyne make?": ("drills.", (7, 0)),
    "Where was Jerome Fertden born?": ("Gluvmouth.", (6, 5)),
    "What is Clara Nandham's extension?": ("6422.", (3, 2)),
}

OPENING = "Answer the question from the documents.\n\n"
TEMPLATE = OPENING + "{context}\n\nQuestion: {question}\nAnswer:"
