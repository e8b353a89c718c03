"""PTX text -> Module: variables, kernels and a flat, scope-resolved instruction list per kernel."""
import re
import struct
from dataclasses import dataclass, field

TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[\w$%.]+(?:::[\w$%.]+)*|[-+*/()\[\]{},;:@!=<>|~&]')
TYPE_BYTES = {t + str(w): w // 8 for t in "busf" for w in (8, 16, 32, 64, 128)}
TYPE_BYTES.update(bf16=2, f16x2=4, bf16x2=4, s16x2=4, u16x2=4, tf32=4, pred=1, f32x2=8, e4m3=1, e5m2=1,
                  e4m3x2=2, e5m2x2=2)


class PtxError(Exception):
    """Anything wrong in the PTX text or in its execution."""


class UnsupportedInstruction(PtxError):
    pass


# ---- operands -------------------------------------------------------------------------------
@dataclass(frozen=True)
class Reg:
    idx: int
    ty: str            # declared type, e.g. 'b32' or 'pred'


@dataclass(frozen=True)
class Special:
    name: str          # '%tid.x'


@dataclass(frozen=True)
class Imm:
    value: object      # int, or float for decimal literals
    bits: int = 0      # 32 / 64 for 0f.. / 0d.. literals (value is then the bit pattern)


@dataclass(frozen=True)
class Sym:
    space: str         # 'global' | 'const' | 'shared' | 'local' | 'param'
    name: str
    off: int = 0


@dataclass(frozen=True)
class Addr:
    base: object       # Reg | Sym | Imm
    off: int = 0


@dataclass(frozen=True)
class Vec:
    items: tuple


@dataclass(frozen=True)
class Pair:
    a: object
    b: object


@dataclass(frozen=True)
class Not:
    a: object


@dataclass(frozen=True)
class Label:
    name: str


@dataclass
class Instr:
    op: str
    args: list
    pred: object = None        # (Reg, negated)
    loc: str = ""
    text: str = ""
    targets: list = None       # branch targets, as instruction indices

    def __post_init__(self):
        self.parts = self.op.split(".")


@dataclass
class Var:
    name: str
    space: str
    size: int
    align: int = 1
    init: bytes = None
    off: int = 0
    ty: str = "b8"
    count: int = 1


@dataclass
class Kernel:
    name: str
    params: list = field(default_factory=list)
    instrs: list = field(default_factory=list)
    regs: list = field(default_factory=list)       # declared type per register index
    shared: dict = field(default_factory=dict)
    local_bytes: int = 0
    shared_bytes: int = 0
    reqntid: tuple = None


@dataclass
class Module:
    kernels: dict = field(default_factory=dict)
    vars: dict = field(default_factory=dict)
    funcs: dict = field(default_factory=dict)
    target: str = ""


SPECIAL = re.compile(r"%(tid|ntid|ctaid|nctaid|clusterid|nclusterid|cluster_ctaid|cluster_nctaid)\.[xyzw]$|"
                     r"%(laneid|warpid|nwarpid|smid|nsmid|gridid|clock|clock_hi|clock64|globaltimer|"
                     r"globaltimer_lo|globaltimer_hi|lanemask_(eq|le|lt|ge|gt)|dynamic_smem_size|"
                     r"total_smem_size|cluster_ctarank|cluster_nctarank)$")


def parse_number(tok):
    """Imm for a numeric token, or None."""
    t = tok.lower()
    if re.fullmatch(r"0f[0-9a-f]{8}", t):
        return Imm(int(t[2:], 16), 32)
    if re.fullmatch(r"0d[0-9a-f]{16}", t):
        return Imm(int(t[2:], 16), 64)
    if re.fullmatch(r"0x[0-9a-f]+u?", t):
        return Imm(int(t.rstrip("u"), 16))
    if re.fullmatch(r"0b[01]+u?", t):
        return Imm(int(t.rstrip("u"), 2))
    if re.fullmatch(r"\d+u?", t):
        t = t.rstrip("u")
        return Imm(int(t, 8) if len(t) > 1 and t[0] == "0" else int(t))
    if re.fullmatch(r"\d*\.\d*(e\d+)?|\d+e\d+", t) and t != ".":
        return Imm(float(t))
    return None


def clean(text):
    """Strip comments and debug sections; make .loc a ';'-terminated statement."""
    text = re.sub(r"/\*.*?\*/", " ", text, flags=re.S)
    files, out = {}, []
    for line in text.splitlines():
        s = line.lstrip()
        m = re.match(r'\.file\s+(\d+)\s+"([^"]*)"', s)
        if m:
            files[int(m[1])] = m[2].rsplit("/", 1)[-1]
            continue
        m = re.match(r"\.loc\s+(\d+)\s+(\d+)\s+\d+(.*)", s)
        if m:
            at = re.search(r"inlined_at\s+(\d+)\s+(\d+)", m[3])
            out.append(f".loc {m[1]} {m[2]} " + (f"{at[1]} {at[2]};" if at else ";"))
            continue
        if "//" in line and not re.search(r'"[^"]*//', line):
            line = line.split("//", 1)[0]
        out.append(line)
    text = "\n".join(out)
    return re.sub(r"\.section\s+\S+\s*\{[^}]*\}", "", text), files


class Scope:
    def __init__(self, parent=None, inherit=True):
        self.parent = parent if inherit else None
        self.names, self.ranges, self.labels, self.tables = {}, {}, {}, {}

    def lookup(self, name):
        s = self
        m = re.match(r"(.*?)(\d+)$", name)
        while s:
            if name in s.names:
                return s.names[name]
            if m:
                for prefix, (ty, n) in s.ranges.items():
                    rest = name[len(prefix):]
                    if name.startswith(prefix) and rest.isdigit() and int(rest) < n:
                        return s, ty
            s = s.parent
        return None


class Parser:
    def __init__(self, text):
        text, self.files = clean(text)
        self.toks = TOKEN.findall(text)
        self.mod = Module()

    def parse(self):
        i, t = 0, self.toks
        while i < len(t):
            if t[i] in (".version", ".address_size"):
                i += 2
            elif t[i] == ".target":
                self.mod.target = t[i + 1]
                i += 2
                while t[i] == ",":
                    i += 2
            elif t[i] in (".visible", ".weak", ".extern", ".common", ";"):
                i += 1
            elif t[i] in (".global", ".const", ".shared"):
                j = self.stmt_end(i)
                v = self.declaration(t[i:j], t[i][1:])
                self.mod.vars[v.name] = v
                i = j + 1
            elif t[i] == ".entry" or t[i] == ".func":
                i = self.function(i)
            elif t[i] == ".loc" or t[i].startswith("."):
                i = self.stmt_end(i) + 1
            else:
                raise PtxError(f"cannot parse module-level token {t[i]!r}")
        return self.mod

    def stmt_end(self, i):
        while self.toks[i] != ";":
            i += 1
        return i

    @staticmethod
    def declaration(t, space):
        """Tokens of a variable or parameter declaration (without ';')."""
        align, ty, i, vec = None, "b8", 1, 1
        while t[i].startswith("."):
            w = t[i][1:]
            if w == "align":
                align = int(t[i + 1])
                i += 1
            elif w in ("v2", "v4"):
                vec = int(w[1])
            elif w in TYPE_BYTES:
                ty = w
            i += 1
        name, count, dims, i = t[i], vec, 1, i + 1
        while i < len(t) and t[i] == "[":
            if t[i + 1] == "]":
                dims, i = 0, i + 2
            else:
                dims, i = dims * parse_number(t[i + 1]).value, i + 3
        count *= dims
        init = None
        if i < len(t) and t[i] == "=":
            vals, neg, raw = [], False, t[i + 1:]
            if any(v not in "{}-,()" and parse_number(v) is None for v in raw):
                raise PtxError(f"symbolic initialiser of {name} is not supported")
            for v in raw:
                if v == "-":
                    neg = True
                elif v not in ("{", "}", ",", "(", ")"):
                    n = parse_number(v)
                    vals.append(-n.value if neg else n.value)
                    neg = False
            n = TYPE_BYTES[ty]
            init = b"".join(struct.pack("<d" if n == 8 else "<f", v) if isinstance(v, float)
                            else (v % (1 << 8 * n)).to_bytes(n, "little") for v in vals)
        size = TYPE_BYTES[ty] * count
        return Var(name, space, size, align or TYPE_BYTES[ty] * vec, init, ty=ty, count=count)

    def params(self, i):
        """Parse '(' params ')' at token i."""
        t, out = self.toks, []
        i += 1
        while t[i] != ")":
            j = i
            while t[j] not in (",", ")"):
                j += 1
            if t[i] == ".reg":
                raise PtxError(".reg function parameters are not supported")
            out.append(self.declaration([x for x in t[i:j] if x != ".ptr"], "param"))
            i = j + (t[j] == ",")
        return out, i + 1

    def function(self, i):
        t = self.toks
        kind, rets, i = t[i], [], i + 1
        if kind == ".func" and t[i] == "(":
            rets, i = self.params(i)
        name, i, params = t[i], i + 1, []
        if t[i] == "(":
            params, i = self.params(i)
        attrs = {}
        while t[i] not in ("{", ";"):
            if t[i].startswith("."):
                key = attrs.setdefault(t[i], [])
            elif t[i] != ",":
                key.append(t[i])
            i += 1
        if t[i] == ";":
            return i + 1
        depth, j = 1, i + 1
        while depth:
            depth += (t[j] == "{") - (t[j] == "}")
            j += 1
        body = t[i + 1:j - 1]
        if kind == ".func":
            self.mod.funcs[name] = (rets, params, body)
        else:
            k = Kernel(name)
            off = 0
            for p in params:
                off = -(-off // p.align) * p.align
                p.off, off = off, off + p.size
            k.params = params
            if ".reqntid" in attrs:
                k.reqntid = tuple(int(x) for x in attrs[".reqntid"])
            Body(self, k).compile(body)
            self.mod.kernels[name] = k
        return j


class Body:
    """Flattens a kernel body: scopes, register numbering, call inlining, labels."""

    def __init__(self, parser, kernel):
        self.p, self.k, self.loc = parser, kernel, ""
        self.files = parser.files
        self.fixups = []
        self.depth = 0
        self.off = {"local": 0, "shared": 0}
        self.regindex = {}

    def compile(self, toks):
        root = Scope()
        for p in self.k.params:
            root.names[p.name] = Sym("param", p.name)
        self.block(toks, root, None)
        self.k.instrs.append(Instr("ret", [], None, self.loc, "ret"))
        for ins, scope in self.fixups:
            ins.targets = [self.find_label(n, scope) for n in ins.targets]
        # .shared variables of the module that this kernel uses come after its own ones;
        # unsized (dynamic) ones alias one area that starts after all of these
        for v in self.k.shared.values():
            if v.size:
                o = -(-self.off["shared"] // v.align) * v.align
                v.off, self.off["shared"] = o, o + v.size
        end = -(-self.off["shared"] // 16) * 16 if self.off["shared"] else 0
        for v in self.k.shared.values():
            if not v.size:
                v.off = -(-end // v.align) * v.align
        self.k.shared_bytes, self.k.local_bytes = self.off["shared"], -(-self.off["local"] // 16) * 16

    @staticmethod
    def find_label(name, scope):
        s = scope
        while s:
            if name in s.labels:
                return s.labels[name]
            s = s.parent
        raise PtxError(f"label {name} not found")

    def block(self, t, scope, ret_label):
        i, stack = 0, [scope]
        while i < len(t):
            s, x = stack[-1], t[i]
            if x == "{":
                stack.append(Scope(s))
                i += 1
            elif x == "}":
                stack.pop()
                i += 1
            elif x == ";":
                i += 1
            elif i + 1 < len(t) and t[i + 1] == ":":
                s.labels[x] = len(self.k.instrs)
                i += 2
                if i < len(t) and t[i] == ".branchtargets":
                    j = t.index(";", i)
                    s.tables[x] = [y for y in t[i + 1:j] if y != ","]
                    i = j + 1
            else:
                j = i
                while t[j] != ";":
                    j += 1
                self.statement(t[i:j], s, ret_label)
                i = j + 1

    def statement(self, t, scope, ret_label):
        x = t[0]
        if x == ".loc":
            where = [f"{self.files.get(int(a), 'file' + a)}:{b}" for a, b in zip(t[1::2], t[2::2])]
            self.loc = " in ".join(where)
        elif x == ".reg":
            ty = t[1][1:]
            for name in " ".join(t[2:]).split(","):
                m = re.match(r"\s*(\S+)\s*<\s*(\d+)\s*>", name)
                if m:
                    scope.ranges[m[1]] = (ty, int(m[2]))
                else:
                    scope.names[name.strip()] = (scope, ty)
        elif x in (".local", ".shared", ".param"):
            space = "shared" if x == ".shared" else "local"
            v = self.p.declaration(t, space)
            if space == "shared":
                v.name = f"{v.name}@{len(self.k.shared)}"
                self.k.shared[v.name] = v
                scope.names[self.p_name(v.name)] = Sym("shared", v.name)
            else:
                off = -(-self.off["local"] // v.align) * v.align
                self.off["local"] = off + v.size
                scope.names[v.name] = Sym("local", "", off)
        elif x in (".pragma", ".branchtargets", ".callprototype", ".calltargets"):
            pass
        elif x.startswith("."):
            raise PtxError("cannot parse statement: " + " ".join(t))
        else:
            self.instruction(t, scope, ret_label)

    @staticmethod
    def p_name(name):
        return name.rsplit("@", 1)[0]

    def instruction(self, t, scope, ret_label):
        text = re.sub(r" ?([,;|+]) ?| ?([\]}])|([\[{@!-]) ", r"\1\2\3", " ".join(t)).replace(",", ", ")
        pred = None
        if t[0] == "@":
            neg = t[1] == "!"
            pred = (self.name(t[1 + neg], scope), neg)
            t = t[2 + neg:]
        op, t = t[0], t[1:]
        base = op.split(".")[0]
        if base == "call":
            return self.call(op, t, scope, pred, text)
        ins = Instr(op, [], pred, self.loc, text)
        if base == "ret" and ret_label is not None:
            ins = Instr("bra", [], pred, self.loc, text)
            ins.targets = [ret_label]
            self.fixups.append((ins, scope))
        elif base == "bra":
            ins.targets = [t[0]]
            self.fixups.append((ins, scope))
        elif base == "brx":
            s = scope
            while t[2] not in s.tables:
                s = s.parent
            ins.args = [self.name(t[0], scope)]
            ins.targets = list(s.tables[t[2]])
            self.fixups.append((ins, scope))
        else:
            i = 0
            while i < len(t):
                a, i = self.operand(t, i, scope)
                ins.args.append(a)
                if i < len(t):
                    if t[i] != ",":
                        raise PtxError(f"cannot parse operands of: {text}")
                    i += 1
        self.k.instrs.append(ins)

    def operand(self, t, i, scope):
        x = t[i]
        if x == "[":
            j = t.index("]", i)
            inner = t[i + 1:j]
            if "," in inner or "{" in inner:        # tensor-map coordinates: kept opaque
                return Label(" ".join(inner)), j + 1
            base, k = self.operand(inner, 0, scope)
            off = 0
            if isinstance(base, Sym):
                base, off = Sym(base.space, base.name), base.off
            while k < len(inner):
                sign = 1
                while inner[k] in "+-":
                    sign *= -1 if inner[k] == "-" else 1
                    k += 1
                off += sign * parse_number(inner[k]).value
                k += 1
            return Addr(base, off), j + 1
        if x == "{":
            items, i = [], i + 1
            while t[i] != "}":
                a, i = self.operand(t, i, scope)
                items.append(a)
                i += t[i] == ","
            return Vec(tuple(items)), i + 1
        if x == "-":
            n = parse_number(t[i + 1])
            return Imm(-n.value, n.bits), i + 2
        if x == "!":
            return Not(self.name(t[i + 1], scope)), i + 2
        a, i = self.name(x, scope), i + 1
        if i < len(t) and t[i] == "|":
            return Pair(a, self.name(t[i + 1], scope)), i + 2
        while isinstance(a, Sym) and i < len(t) and t[i] in "+-":
            n = parse_number(t[i + 1]).value * (-1 if t[i] == "-" else 1)
            a, i = Sym(a.space, a.name, a.off + n), i + 2
        return a, i

    def name(self, x, scope):
        if x == "_":
            return None
        n = parse_number(x)
        if n is not None:
            return n
        found = scope.lookup(x)
        if isinstance(found, Sym):
            return found
        if found:
            s, ty = found
            key = (id(s), x)
            if key not in self.regindex:
                self.regindex[key] = (Reg(len(self.k.regs), ty), s)   # keeps s alive: id is unique
                self.k.regs.append(ty)
            return self.regindex[key][0]
        if SPECIAL.match(x):
            return Special(x)
        if x == "WARP_SZ":
            return Imm(32)
        v = self.p.mod.vars.get(x)
        if v:
            if v.space == "shared" and x not in self.k.shared:
                self.k.shared[x] = Var(x, "shared", v.size, v.align)
            return Sym(v.space, x)
        return Label(x)

    def call(self, op, t, scope, pred, text):
        groups, i, func = [], 0, None
        while i < len(t):
            if t[i] == "(":
                j = t.index(")", i)
                groups.append([y for y in t[i + 1:j] if y != ","])
                i = j + 1
            elif t[i] == ",":
                i += 1
            else:
                if func is None:
                    func, nret = t[i], len(groups)
                i += 1
        rets = groups[0] if nret else []
        args = groups[nret] if len(groups) > nret else []
        if func == "__assertfail":
            self.k.instrs.append(Instr("assertfail", [self.name(a, scope) for a in args], pred, self.loc, text))
            return
        if func == "vprintf":           # output is dropped
            return
        if func not in self.p.mod.funcs:
            raise UnsupportedInstruction(f"call of {func}: {text}")
        if pred is not None:
            raise UnsupportedInstruction(f"predicated call: {text}")
        self.depth += 1
        if self.depth > 32:
            raise UnsupportedInstruction(f"recursive call of {func}")
        fr, fp, body = self.p.mod.funcs[func]
        inner = Scope(scope, inherit=False)
        for formal, actual in zip(fr + fp, rets + args):
            inner.names[formal.name] = self.name(actual, scope)
        end = f"$ret{len(self.k.instrs)}"
        loc = self.loc
        self.block(body, inner, end)
        inner.labels[end] = len(self.k.instrs)
        self.loc = loc
        self.depth -= 1


def parse(text):
    return Parser(text).parse()
