"""What the records of all agents of a federation say together: who was missed, what that cost, who used whom."""

from collections import Counter
from pathlib import Path

from decaf_lora.records import read_records


class Ledger:
    """Of a federation with one exchange a round.

    Args:
        folders: name -> the folder of its run, in the order of the agents' numbers. Where there is none, the agent has
            left nothing.
    """

    def __init__(self, folders):
        self.names = list(folders)
        files = [Path(folder) / "records.jsonl" for folder in folders.values()]
        self.records = [{r.round: r for r in read_records(file)} if file.exists() else {} for file in files]

    def scores(self):
        """Name -> the last score."""
        found = [[r.scores[0] for r in own.values() if r.scores] for own in self.records]
        return {name: scores[-1] for name, scores in zip(self.names, found, strict=True) if scores}

    def used(self, agent, round_):
        """Numbers of the neighbours that an agent used in a round; None if it has no record of it."""
        record = self.records[agent].get(round_)
        return None if record is None else {int(j) for j in record.weights or {}}

    def verdict(self, agent, neighbour, round_):
        """Why an agent did not use a neighbour in a round; None if its records do not say."""
        for record in self.records[agent].values():
            found = (record.missed or {}).get(str(round_), {}).get(str(neighbour))
            if found:
                return found
        return None

    def missed(self, name):
        """Rounds of the run in which an agent was alone, or that it left out."""
        own = self.records[self.names.index(name)]
        return max(own) - sum(bool(record.weights) for record in own.values())

    def uses(self):
        """Counts of edges used in a round: by both ends, or by one.

        One end alone is right in two cases: the other end's verdict is "cut off" (the window of the protocol), or
        the other end has no word of that round, as it crashed in it. All else counts as "wrong".
        """
        counts = Counter({"both": 0, "window": 0, "crash": 0, "wrong": 0})
        for i, own in enumerate(self.records):
            for round_ in own:
                for j in self.used(i, round_):
                    theirs = self.used(j, round_)
                    if theirs is not None and i in theirs:
                        counts["both"] += 1 / 2
                        continue
                    verdict = self.verdict(j, i, round_)
                    crashed = theirs is None and verdict is None
                    counts["window" if verdict == "cut off" else "crash" if crashed else "wrong"] += 1
        return {kind: int(count) for kind, count in counts.items()}

    def cost(self, name):
        """Seconds that each neighbour has waited for an agent that it then missed, beyond the wait for others.

        Returns:
            Name of the neighbour -> seconds, over all rounds.
        """
        number, costs = self.names.index(name), {}
        for i, own in enumerate(self.records):
            for record in own.values():
                waited = {int(j): seconds for j, seconds in (record.waited or {}).items()}
                if number in waited and number not in self.used(i, record.round):
                    others = max((waited[j] for j in self.used(i, record.round)), default=0.0)
                    costs[self.names[i]] = costs.get(self.names[i], 0.0) + max(waited[number] - others, 0.0)
        return costs
