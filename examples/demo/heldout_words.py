"""The vocabulary of the held-out side: no name, product word or phrasing of train_words.py."""

from __future__ import annotations

import lists
from lists import on_side
from words import Words, lines, pairs, products

FIRST = on_side(lists.FIRST, heldout=True)
LAST = on_side(lists.LAST, heldout=True)
FIRST_WORDS = on_side(f"{lists.ADJECTIVES} {lists.KINDS}", heldout=True)
NOUNS = on_side(lists.NOUNS, heldout=True)

HELDOUT = Words(
    names=pairs(FIRST, LAST),
    products=products(FIRST_WORDS, NOUNS),
    greetings=lines("good afternoon\n hello there\n dear shop"),
    intros=lines("{name} is writing\n the name is {name}\n you are hearing from {name}\n hello from {name}"),
    sign_offs=lines("kind regards, {name}\n sincerely, {name}\n with thanks, {name}\n yours truly, {name}"),
    closings=lines("please get back to me\n I hope you can help\n thanks for your help\n what should I do?"),
    cues={
        "broken": lines("""
            {the} {product} reached me broken
            {the} {product} has a crack in it
            {the} {product} no longer works
            {the} {product} was damaged on arrival
            {the} {product} broke after two days
        """),
        "late": lines("""
            I have not received {the} {product} yet
            {the} {product} still has not come
            {the} {product} is very late
            the delivery of {the} {product} is delayed
            we are still waiting for {the} {product}
        """),
        "wrong": lines("""
            I received the wrong item instead of {the} {product}
            you sent me something else and not {the} {product}
            I wanted {the} {product} but a different item came
            instead of {the} {product} you shipped another thing
            the wrong thing was in the box for {the} {product}
        """),
        "refund": lines("""
            I would like my money back for {the} {product}
            please give me a refund for {the} {product}
            I am asking for a refund of {the} {product}
            could you refund me for {the} {product}?
            I sent back {the} {product} and want a refund
        """),
        "question": lines("""
            how should I wash {the} {product}?
            is {the} {product} suitable for children?
            what size is {the} {product}?
            does {the} {product} come with a manual?
            can you tell me how {the} {product} works?
        """),
    },
    orders=lines(
        "this is about order {order}\n the order was number {order}\n see order {order}\n my reference is {order}"
    ),
    dates=lines("""
        I placed the order on {date}
        it was bought on {date}
        purchase date {date}
        I purchased it on {date}
    """),
    amounts=lines(
        "I was charged ${amount}\n it cost me ${amount}\n the cost was {amount} dollars\n in total ${amount}"
    ),
    reviews={
        "positive": lines(
            "{the} {product} is fantastic\n I really love {the} {product}\n so happy with {the} {product}"
        ),
        "negative": lines(
            "{the} {product} is horrible\n I really hate {the} {product}\n so unhappy with {the} {product}"
        ),
    },
    asks={
        "label": lines("positive or negative message?\n answer positive or negative:"),
        "order": lines("return only the order number:\n state the order number:"),
        "date": lines("convert to an ISO date:\n as YYYY-MM-DD:"),
        "surname": lines("write the surname first:\n reorder with the surname first:"),
    },
)
