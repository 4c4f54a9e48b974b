"""The sizes of a run's samples: one, or several of which each iteration has one."""

DYNAMIC = ("use_dynamic_shifting", "time_shift_type", "base_shift", "max_shift")
DYNAMIC += ("base_image_seq_len", "max_image_seq_len")


def sizes_of(value):
    """A --size as list of [height, width], [] for None. value: also from a JSON file; a number,
    [height, width] or a list of these pairs. None if it is nothing of the kind."""
    if value is None:
        return []
    if is_number(value):
        return [[value, value]]
    if not isinstance(value, list) or not value:
        return None
    pairs = [value] if is_number(value[0]) else value
    fits = all(isinstance(p, list) and len(p) == 2 and all(map(is_number, p)) for p in pairs)
    return pairs if fits else None


def is_number(value):
    return isinstance(value, int) and not isinstance(value, bool)


def size_text(size):
    """[height, width] -> as in --size."""
    height, width = size
    return f"{height}" if height == width else f"{height}x{width}"


class Sizes:
    """The sizes of a teacher, which it shares with its copies: student, critic and averages.

    One of them is in use, and all these models have its shape and its time shift. The first one
    is that of pictures, metrics and the student's folder.
    """

    def __init__(self, sizes, shapes, schedules, schedule, scheduler):
        """sizes: [height, width] in pixels. shapes, schedules: of samples of these sizes.
        schedule: that of the models, which becomes like one of `schedules`. scheduler: of
        read_scheduler."""
        self.sizes = sizes
        self.dynamic = {}  # the entries of the scheduler that make the time shift depend on size
        if scheduler.get("use_dynamic_shifting"):
            self.dynamic = {key: scheduler[key] for key in DYNAMIC if key in scheduler}
        self.shapes = shapes
        self.schedules = schedules
        self.schedule = schedule
        self.use(0)

    def __len__(self):
        return len(self.sizes)

    def use(self, i):
        """Number i from now on."""
        self.index = i
        self.shape = self.shapes[i]
        vars(self.schedule).update(vars(self.schedules[i]))

    def each(self):
        """Yields the numbers of all sizes, while each is in use; the first one is afterwards."""
        for i in range(len(self)):
            self.use(i)
            yield i
        self.use(0)

    def use_smallest(self):
        """That with the shortest side: heads that are built for its features fit all sizes."""
        self.use(min(range(len(self)), key=lambda i: min(self.sizes[i])))

    def draw(self, draw):
        """Uses one of them by chance, on all processes the same. draw: BatchRandom."""
        self.use(draw.shared_randint(0, len(self)))

    def __str__(self):
        return ", ".join(map(size_text, self.sizes))
