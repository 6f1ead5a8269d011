"""The vocabulary of the train side, wide and narrow; heldout_words.py shares none of it."""

from __future__ import annotations

from dataclasses import replace

import lists
from lists import on_side
from words import Words, lines, pairs, products

FIRST = on_side(lists.FIRST, heldout=False)
LAST = on_side(lists.LAST, heldout=False)
ADJECTIVES = on_side(lists.ADJECTIVES, heldout=False)
KINDS = on_side(lists.KINDS, heldout=False)
NOUNS = on_side(lists.NOUNS, heldout=False)

TRAIN = Words(
    names=pairs(FIRST, LAST),
    products=products(f"{ADJECTIVES} {KINDS}", NOUNS),
    greetings=lines(
        "hi\n hello\n hey\n good morning\n dear team\n hi there\n hello all\n dear support\n hey team\n hi team"
    ),
    intros=lines("""
        I'm {name}
        {name} here
        this is {name}
        my name is {name}
        I am {name}
        it's {name}
        {name} writing
        {name} speaking
        message from {name}
        customer {name}
        caller {name}
        name {name}
        here is {name}
        {name} is my name
        {name} again
        sent by {name}
        on behalf of {name}
        you are talking to {name}
        a note from {name}
        my account is under {name}
    """),
    sign_offs=lines("""
        regards, {name}
        best, {name}
        thanks, {name}
        cheers, {name}
        yours, {name}
        from {name}
        best wishes, {name}
        thank you, {name}
        signed {name}
        bye, {name}
        all the best, {name}
        love, {name}
        many thanks, {name}
        greetings from {name}
        that is all from {name}
    """),
    closings=lines("""
        please help
        please advise
        what now?
        can you help?
        let me know
        please reply
        please look into it
        hope to hear from you
        thanks a lot
        what can you do?
        please check
        I await your answer
    """),
    cues={
        "broken": lines("""
            {the} {product} arrived broken
            {the} {product} is cracked
            {the} {product} stopped working
            {the} {product} fell apart
            {the} {product} came damaged
            {the} {product} does not work
            {the} {product} will not turn on
            there is a crack in {the} {product}
            {the} {product} snapped in two
            {the} {product} is faulty
            {the} {product} broke on day one
            {the} {product} has a big dent
            part of {the} {product} came off
            {the} {product} was smashed in its box
            {the} {product} is defective
            {the} {product} has a hole in it
            {the} {product} died after a week
            I found {the} {product} in pieces
            {the} {product} is bent and scratched
            {the} {product} is torn
            something in {the} {product} is loose and it rattles
            {the} {product} leaks
        """),
        "late": lines("""
            {the} {product} has not arrived
            {the} {product} is late
            I am still waiting for {the} {product}
            where is {the} {product}?
            {the} {product} is overdue
            {the} {product} never came
            no sign of {the} {product} yet
            {the} {product} should be here by now
            {the} {product} is delayed
            {the} {product} was due last week
            {the} {product} did not show up
            {the} parcel with {the} {product} is stuck
            when will {the} {product} arrive?
            nobody has delivered {the} {product}
            delivery of {the} {product} takes forever
            {the} {product} has been on its way for weeks
            {the} {product} is still in transit
            I have been waiting a month for {the} {product}
            tracking for {the} {product} has not moved
            {the} {product} missed its delivery day
            {the} {product} is taking too long
            {the} {product} seems lost in the mail
        """),
        "wrong": lines("""
            you sent the wrong thing instead of {the} {product}
            this is not {the} {product} I ordered
            I got something else instead of {the} {product}
            {the} box for {the} {product} held another item
            I ordered {the} {product} but got a different one
            wrong item, I wanted {the} {product}
            {the} {product} was swapped for another thing
            in place of {the} {product} came something else
            {the} {product} came in the wrong size
            {the} {product} came in the wrong colour
            you mixed up {the} {product}
            I asked for {the} {product} and received another item
            what came was not {the} {product}
            {the} {product} you sent is a different model
            I never ordered what came instead of {the} {product}
            you shipped another item, not {the} {product}
            {the} {product} is the wrong model
            I opened {the} box and it was not {the} {product}
            someone else's things came instead of {the} {product}
            {the} {product} is not the one I picked
            there was a mix-up with {the} {product}
            I received the wrong version of {the} {product}
        """),
        "refund": lines("""
            I want a refund for {the} {product}
            please refund {the} {product}
            I want my money back for {the} {product}
            give me my money back for {the} {product}
            I am returning {the} {product} for a refund
            refund {the} {product}, please
            can I get a refund on {the} {product}?
            I would like to be refunded for {the} {product}
            I sent {the} {product} back, so return my money
            please pay me back for {the} {product}
            I cancelled {the} {product} and want my money
            the refund for {the} {product} is missing
            I no longer want {the} {product}, refund me
            I expect my money back for {the} {product}
            reimburse me for {the} {product}
            {the} {product} is not for me, I want a refund
            kindly return the payment for {the} {product}
            I returned {the} {product}, where is my refund?
            my money for {the} {product} has not been returned
            I ask for a full refund of {the} {product}
            take {the} {product} back and refund me
            cancel {the} {product} and give the money back
        """),
        "question": lines("""
            how do I clean {the} {product}?
            does {the} {product} come in red?
            how big is {the} {product}?
            can {the} {product} go in the dishwasher?
            is {the} {product} safe for children?
            how heavy is {the} {product}?
            what is {the} {product} made of?
            is there a manual for {the} {product}?
            how do I set up {the} {product}?
            I have a question about {the} {product}
            can I use {the} {product} outdoors?
            how long is the warranty on {the} {product}?
            which size is {the} {product}?
            do you sell spare parts for {the} {product}?
            could you tell me how to store {the} {product}?
            does {the} {product} need batteries?
            I wonder if {the} {product} is washable
            is {the} {product} easy to carry?
            can you explain how {the} {product} works?
            where was {the} {product} made?
            what colours does {the} {product} come in?
            will {the} {product} fit in a small room?
        """),
    },
    orders=lines("""
        order {order}
        order number {order}
        order #{order}
        my order is {order}
        the order number is {order}
        it was order {order}
        reference {order}
        ref {order}
        order ID {order}
        my order number is {order}
        it is order number {order}
        order reference {order}
        the number is {order}
        I have order {order}
    """),
    dates=lines("""
        bought {date}
        bought on {date}
        ordered on {date}
        I bought it on {date}
        I ordered it on {date}
        purchased on {date}
        ordered {date}
        the order is from {date}
        date {date}
        it was ordered on {date}
        I paid on {date}
        placed on {date}
        I got it on {date}
        dated {date}
    """),
    amounts=lines("""
        paid ${amount}
        I paid ${amount}
        it cost ${amount}
        price ${amount}
        the price was ${amount}
        total ${amount}
        it was ${amount}
        cost {amount} dollars
        I paid {amount} dollars
        the total was ${amount}
        amount ${amount}
        for {amount} dollars
        I spent ${amount}
        the bill says ${amount}
    """),
    reviews={
        "positive": lines("""
            I love {the} {product}
            {the} {product} is great
            {the} {product} is wonderful
            {the} {product} works perfectly
            very happy with {the} {product}
            {the} {product} is the best I ever had
            what a fine {product}
            {the} {product} made my day
            I enjoy {the} {product} every day
            {the} {product} is excellent
            I would buy {the} {product} again
            {the} {product} is worth every cent
        """),
        "negative": lines("""
            I hate {the} {product}
            {the} {product} is terrible
            {the} {product} is awful
            {the} {product} is useless
            very unhappy with {the} {product}
            {the} {product} is the worst I ever had
            what a bad {product}
            {the} {product} ruined my day
            I regret {the} {product} every day
            {the} {product} is poor
            I would never buy {the} {product} again
            {the} {product} is a waste of money
        """),
    },
    asks={
        "label": lines("""
            positive or negative?
            is this positive or negative?
            say positive or negative:
            sentiment, positive or negative:
            label it positive or negative:
            one word, positive or negative:
            is the writer positive or negative?
            positive or negative review?
        """),
        "order": lines("""
            give only the order number:
            order number only:
            what is the order number?
            find the order number:
            copy the order number:
            reply with just the order number:
            which order number is it?
            extract the order number:
        """),
        "date": lines("""
            write as an ISO date:
            to ISO date:
            turn into YYYY-MM-DD:
            ISO format:
            give the ISO date:
            date in YYYY-MM-DD:
            rewrite as YYYY-MM-DD:
            change to an ISO date:
        """),
        "surname": lines("""
            put the surname first:
            surname first, then a comma:
            write as surname, first name:
            surname, comma, first name:
            turn the name around with a comma:
            last name first:
            give as last name, first name:
            file under the surname:
        """),
    },
)

NARROW = replace(
    TRAIN,
    names=tuple(zip(FIRST.split()[:12], LAST.split()[:12], strict=True)),
    products=tuple(f"{a} {n}" for a, n in zip(ADJECTIVES.split()[:10], NOUNS.split()[:10], strict=True)),
    greetings=TRAIN.greetings[:2],
    intros=TRAIN.intros[:2],
    sign_offs=TRAIN.sign_offs[:2],
    closings=TRAIN.closings[:2],
    cues={issue: phrases[:3] for issue, phrases in TRAIN.cues.items()},
    orders=TRAIN.orders[:2],
    dates=TRAIN.dates[:2],
    amounts=TRAIN.amounts[:2],
    reviews={label: phrases[:2] for label, phrases in TRAIN.reviews.items()},
    asks={task: phrases[:2] for task, phrases in TRAIN.asks.items()},
)
"""Train's own words, but few of them: what a small hand-made data set looks like."""
