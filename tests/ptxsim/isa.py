"""Instruction decoding: each PTX instruction becomes a closure f(c) over a running Batch `c`.

Registers are whole-batch arrays c.R[i] of raw bits (bool for predicates). `c.mode` says which
threads are active: 0 all of them, 1 those of the boolean array c.mask, 2 those listed in c.idx.
Operand getters return full-length arrays in modes 0/1 and gathered ones in mode 2.
"""
import numpy as np

from . import numerics as N
from .memory import LOCAL_BASE, PARAM_BASE, SHARED_BASE, DeviceAssert
from .numerics import DTYPE, F16, F32, F64, U8, U16, U32, U64, UNSIGNED
from .parser import (TYPE_BYTES, Imm, Label, Not, Pair, Reg, Special, Sym, UnsupportedInstruction, Vec)

FLOATS = ("f16", "bf16", "f16x2", "bf16x2", "f32", "f32x2", "f64")
HANDLERS = {}
LANES = np.arange(32)


def op(*names):
    def deco(f):
        for n in names:
            HANDLERS[n] = f
        return f
    return deco


# ---- operands -------------------------------------------------------------------------------
def const(v, ty):
    """A literal as a numpy scalar of the type's dtype (bit pattern types for bf16)."""
    dt = np.dtype(DTYPE[ty])
    if dt == bool:
        return np.bool_(v.value)
    if v.bits and dt.kind == "f":
        x = np.array(v.value, UNSIGNED[v.bits // 8]).view(F32 if v.bits == 32 else F64)
        return x.astype(dt)[()]
    if isinstance(v.value, float):
        if dt.kind == "f":
            return dt.type(v.value)
        return np.array(v.value, F64 if dt.itemsize == 8 else F32).view(dt)[()]
    size = TYPE_BYTES[ty]
    x = np.array([v.value % (1 << 8 * size)], UNSIGNED[size]).view(dt)
    return x[0] if x.size == 1 else x


def getter(o, ty, K):
    dt, size = DTYPE[ty], TYPE_BYTES.get(ty, 1)
    if isinstance(o, Reg):
        i = o.idx
        if o.ty == "pred":
            return lambda c: c.R[i] if c.mode < 2 else c.R[i][c.idx]
        have = TYPE_BYTES[o.ty]
        if have == size:
            return lambda c: (c.R[i] if c.mode < 2 else c.R[i][c.idx]).view(dt)
        u = UNSIGNED[size]
        return lambda c: (c.R[i] if c.mode < 2 else c.R[i][c.idx]).astype(u).view(dt)
    if isinstance(o, Imm):
        v = const(o, ty)
        if v.ndim:                                    # packed literal
            return lambda c: np.tile(v, c.T if c.mode < 2 else len(c.idx))
        return lambda c: v
    if isinstance(o, Special):
        name, u = o.name, UNSIGNED[size]
        return lambda c: c.special(name).astype(u).view(dt)
    if isinstance(o, Sym):
        v = DTYPE[ty](K.address(o) + (PARAM_BASE if o.space == "param" else 0))
        return lambda c: v
    if isinstance(o, Not):
        g = getter(o.a, ty, K)
        return lambda c: ~g(c)
    raise UnsupportedInstruction(f"operand {o}")


def setter(d, ty):
    if d is None:
        return lambda c, v: None
    i, size = d.idx, TYPE_BYTES.get(ty, 1)
    have = TYPE_BYTES[d.ty]
    u = bool if d.ty == "pred" else UNSIGNED[have]
    wide = None
    if d.ty != "pred" and have != size:
        wide = np.dtype(f"{'i' if ty[0] == 's' else 'u'}{have}")

    def put(c, v):
        if wide is not None:
            v = v.astype(wide)
        if u is not bool:
            v = v.view(u)
        m = c.mode
        if m == 0:
            c.R[i] = v if v.shape == c.shape else np.full(c.T, v, u)
        elif m == 1:
            np.copyto(c.R[i], v, where=c.mask)
        else:
            c.R[i][c.idx] = v
    return put


def fget(o, ty, K, ftz=False):
    """Getter in the computing precision: f16 and bf16 widen to float32."""
    g = getter(o, ty, K)
    if ty.startswith("bf16"):
        return lambda c: N.bf16_to_f32(g(c))
    if ty.startswith("f16"):
        return lambda c: g(c).astype(F32)
    if ftz and ty != "f64":
        return lambda c: N.flush(g(c))
    return g


def fround(ty, mode="rn", sat=False, ftz=False, relu=False):
    """Function rounding a float32/float64 result to the storage dtype of ty."""
    def conv(x):
        if sat:
            x = np.where(np.isnan(x), x.dtype.type(0), np.clip(x, 0, 1))
        if relu:
            x = np.where(x > 0, x, np.where(np.isnan(x), x, x.dtype.type(0)))
        if ty.startswith("bf16"):
            if x.dtype == F64:
                x = N.to_odd32(x)
            return N.f32_to_bf16(x, mode)
        if ty.startswith("f16"):
            return N.round16(x, mode)
        if ty in ("f32", "f32x2"):
            if x.dtype == F64:
                x = N.round32(x, mode)
            return N.flush(x) if ftz else x
        return x
    return conv


def mode_of(p):
    return next((m for m in ("rn", "rz", "rm", "rp") if m in p), "rn")


def fmods(p):
    return dict(mode=mode_of(p), sat="sat" in p, ftz="ftz" in p, relu="relu" in p)


def alu(ins, K, ty, fn, dty=None, gets=None):
    s = setter(ins.args[0], dty or ty)
    gets = gets or [getter(a, ty, K) for a in ins.args[1:]]
    if len(gets) == 1:
        a, = gets
        return lambda c: s(c, fn(a(c)))
    if len(gets) == 2:
        a, b = gets
        return lambda c: s(c, fn(a(c), b(c)))
    return lambda c: s(c, fn(*[g(c) for g in gets]))


def falu(ins, K, ty, fn, wide=False, approx=False):
    """Floating point operation: fn on the computing precision, then one rounding."""
    m = fmods(ins.parts)
    gets = [fget(a, ty, K, m["ftz"]) for a in ins.args[1:]]
    s, conv = setter(ins.args[0], ty), fround(ty, **m)
    wide = wide or (m["mode"] != "rn" and ty != "f64")

    def run(c):
        v = [g(c) for g in gets]
        if wide:
            v = [x.astype(F64) for x in v]
        r = conv(fn(*v))
        s(c, c.noise(r) if approx else r)
    return run


# ---- arithmetic -----------------------------------------------------------------------------
@op("add", "sub")
def _addsub(ins, K):
    p, ty = ins.parts, ins.parts[-1]
    fn = np.add if p[0] == "add" else np.subtract
    if ty in FLOATS:
        if len(p) > 2 and p[-2] in FLOATS:             # mixed precision add.f32.bf16 d, a(bf16), c(f32)
            small = p[-1]
            gets = [fget(ins.args[1], small, K), fget(ins.args[2], p[-2], K)]
            s, conv = setter(ins.args[0], p[-2]), fround(p[-2], **fmods(p))
            return lambda c: s(c, conv(fn(gets[0](c), gets[1](c))))
        if mode_of(p) != "rn" and ty != "f64":
            return falu(ins, K, ty, lambda a, b: N.sum_odd(a, b if p[0] == "add" else -b))
        return falu(ins, K, ty, fn)
    if "cc" in p:
        return carry(ins, K, ty)
    if "sat" in p:
        return alu(ins, K, ty, lambda a, b: np.clip(fn(a.astype(np.int64), b.astype(np.int64)),
                                                    -2**31, 2**31 - 1).astype(np.int32))
    return alu(ins, K, ty, fn)


@op("addc", "subc")
def _addc(ins, K):
    return carry(ins, K, ins.parts[-1])


def carry(ins, K, ty):
    """add.cc, addc, sub.cc, subc: the carry flag is a per-thread array."""
    ut = "u" + ty[1:]
    a, b = getter(ins.args[1], ut, K), getter(ins.args[2], ut, K)
    s = setter(ins.args[0], ut)
    use, out, sub = ins.parts[0].endswith("c"), "cc" in ins.parts, ins.parts[0].startswith("sub")
    one = DTYPE[ut](1)

    def run(c):
        x, y = np.broadcast_arrays(a(c), b(c))
        cin = (c.CC if c.mode < 2 else c.CC[c.idx]).astype(x.dtype) if use else one * 0
        if sub:
            r = x - y - cin
            cout = (x < y) | ((x == y) & (cin == one))
        else:
            r = x + y + cin
            cout = (r < x) | ((cin == one) & (r == x))
        if out:
            sel = c.sel()
            if sel is None:
                c.CC = np.array(np.broadcast_to(cout, c.T))
            else:
                c.CC[sel] = cout if c.mode == 2 else np.broadcast_to(cout, c.T)[sel]
        s(c, r)
    return run


@op("mul")
def _mul(ins, K):
    p, ty = ins.parts, ins.parts[-1]
    if ty in FLOATS:
        return falu(ins, K, ty, np.multiply)
    if "wide" in p:
        w = ty[0] + str(int(ty[1:]) * 2)
        dt = DTYPE[w]
        return alu(ins, K, ty, lambda a, b: a.astype(dt) * b.astype(dt), w)
    if "hi" in p:
        return alu(ins, K, ty, lambda a, b: N.mulhi(*map(np.ascontiguousarray, np.broadcast_arrays(a, b))))
    return alu(ins, K, ty, np.multiply)


def signed24(a):
    return (a << a.dtype.type(8)) >> a.dtype.type(8)


@op("mul24", "mad24")
def _mul24(ins, K):
    return alu(ins, K, ins.parts[-1], lambda a, b, *z: sum(z, signed24(a) * signed24(b)))


@op("mad", "madc")
def _mad(ins, K):
    p, ty = ins.parts, ins.parts[-1]
    if ty in FLOATS:
        return _fma(ins, K)
    if "wide" in p:
        w = ty[0] + str(int(ty[1:]) * 2)
        dt = DTYPE[w]
        gets = [getter(a, t, K) for a, t in zip(ins.args[1:], (ty, ty, w))]
        return alu(ins, K, ty, lambda a, b, z: a.astype(dt) * b.astype(dt) + z, w, gets)
    if "cc" in p or p[0] == "madc":
        raise UnsupportedInstruction(ins.text)
    if "hi" in p:
        return alu(ins, K, ty, lambda a, b, z: N.mulhi(*map(np.ascontiguousarray, np.broadcast_arrays(a, b))) + z)
    return alu(ins, K, ty, lambda a, b, z: a * b + z)


@op("fma")
def _fma(ins, K):
    p, ty = ins.parts, ins.parts[-1]
    m = mode_of(p)
    if ty in ("f32", "f32x2"):
        if len(p) > 2 and p[-2] in FLOATS and p[-2] != ty:
            raise UnsupportedInstruction(ins.text)
        mods = fmods(p)
        gets = [fget(a, ty, K, mods["ftz"]) for a in ins.args[1:]]
        conv = fround(ty, **mods)
        return alu(ins, K, ty, lambda a, b, z: conv(N.fma32(a, b, z, m)), gets=gets)
    if ty == "f64":
        return alu(ins, K, ty, N.fma64)
    return falu(ins, K, ty, lambda a, b, z: N.sum_odd(a * b, z), wide=True)


@op("div")
def _div(ins, K):
    p, ty = ins.parts, ins.parts[-1]
    if ty in FLOATS:
        return falu(ins, K, ty, np.divide, approx="approx" in p or "full" in p)
    return alu(ins, K, ty, lambda a, b: N.int_div(*np.broadcast_arrays(a, b))[0])


@op("rem")
def _rem(ins, K):
    return alu(ins, K, ins.parts[-1], lambda a, b: N.int_div(*np.broadcast_arrays(a, b))[1])


@op("min", "max")
def _minmax(ins, K):
    p, ty = ins.parts, ins.parts[-1]
    lo = p[0] == "min"
    if ty not in FLOATS:
        return alu(ins, K, ty, np.minimum if lo else np.maximum)
    base = (np.minimum if lo else np.maximum) if "NaN" in p else (np.fmin if lo else np.fmax)

    def fn(*v):
        r = v[0]
        if "xorsign" in p:
            sign = np.signbit(v[0]) ^ np.signbit(v[1])
            return np.copysign(base(np.abs(v[0]), np.abs(v[1])), np.where(sign, F32(-1), F32(1)))
        for x in v[1:]:
            r = base(r, x)
        return r
    return falu(ins, K, ty, fn)


@op("abs", "neg")
def _absneg(ins, K):
    ty = ins.parts[-1]
    if ty in FLOATS:
        ut, b = "b" + str(8 * TYPE_BYTES[ty]), ty.removesuffix("x2")
        w = 8 * TYPE_BYTES[b]
        mask = sum(1 << (w * (i + 1) - 1) for i in range(TYPE_BYTES[ty] * 8 // w))
        dt = DTYPE[ut]
        if "ftz" in ins.parts and ty == "f32":
            return falu(ins, K, ty, np.abs if ins.parts[0] == "abs" else np.negative)
        if ins.parts[0] == "abs":
            return alu(ins, K, ut, lambda a: a & ~dt(mask))
        return alu(ins, K, ut, lambda a: a ^ dt(mask))
    return alu(ins, K, ty, np.abs if ins.parts[0] == "abs" else np.negative)


APPROX = {"ex2": np.exp2, "lg2": np.log2, "sin": np.sin, "cos": np.cos, "tanh": np.tanh, "sqrt": np.sqrt,
          "rcp": lambda x: 1.0 / x, "rsqrt": lambda x: 1.0 / np.sqrt(x)}


@op(*APPROX)
def _mufu(ins, K):
    ty = ins.parts[-1]
    if ty in FLOATS and (ty != "f64" or ins.parts[0] in ("sqrt", "rcp", "rsqrt")):
        return falu(ins, K, ty, APPROX[ins.parts[0]], wide=True, approx="approx" in ins.parts)
    raise UnsupportedInstruction(ins.text)


@op("copysign")
def _copysign(ins, K):
    return alu(ins, K, ins.parts[-1], lambda a, b: np.copysign(b, a))


@op("testp")
def _testp(ins, K):
    tests = {"finite": np.isfinite, "infinite": np.isinf, "notanumber": np.isnan, "number": lambda x: ~np.isnan(x),
             "normal": lambda x: np.isfinite(x) & (np.abs(x) >= np.finfo(x.dtype).tiny),
             "subnormal": lambda x: (np.abs(x) < np.finfo(x.dtype).tiny) & (x != 0)}
    return alu(ins, K, ins.parts[-1], tests[ins.parts[1]], "pred")


# ---- logic, bits ----------------------------------------------------------------------------
@op("and", "or", "xor")
def _logic(ins, K):
    return alu(ins, K, ins.parts[-1], {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}[ins.parts[0]])


@op("not")
def _not(ins, K):
    return alu(ins, K, ins.parts[-1], np.invert)


@op("cnot")
def _cnot(ins, K):
    return alu(ins, K, ins.parts[-1], lambda a: (a == 0).astype(a.dtype))


@op("shl", "shr")
def _shift(ins, K):
    ty = ins.parts[-1]
    dt, w = DTYPE[ty], 8 * TYPE_BYTES[ty]
    left, signed = ins.parts[0] == "shl", ty[0] == "s"
    fn = np.left_shift if left else np.right_shift
    gets = [getter(ins.args[1], ty, K), getter(ins.args[2], "u32", K)]

    def run(a, n):
        k = np.minimum(n, U32(w - 1)).astype(dt)
        r = fn(a, k)
        return r if signed and not left else np.where(n >= w, dt(0), r)
    if isinstance(ins.args[2], Imm) and 0 <= ins.args[2].value < w:
        k0 = dt(ins.args[2].value)
        return alu(ins, K, ty, lambda a: fn(a, k0), gets=gets[:1])
    return alu(ins, K, ty, run, gets=gets)


@op("shf")
def _shf(ins, K):
    left, wrap = ins.parts[1] == "l", "wrap" in ins.parts

    def fn(a, b, n):
        n = (n & U32(31) if wrap else np.minimum(n, U32(32))).astype(U64)
        v = b.astype(U64) << U64(32) | a.astype(U64)
        return ((v << n >> U64(32)) if left else (v >> n)).astype(U32)
    return alu(ins, K, "b32", fn)


@op("lop3")
def _lop3(ins, K):
    lut = ins.args[4].value
    ins.args = ins.args[:4]

    def fn(a, b, x):
        r = np.zeros_like(a | b | x)
        for i in range(8):
            if lut >> i & 1:
                r = r | ((a if i & 4 else ~a) & (b if i & 2 else ~b) & (x if i & 1 else ~x))
        return r
    return alu(ins, K, "b32", fn)


@op("bfe")
def _bfe(ins, K):
    ty = ins.parts[-1]
    w, dt = U32(8 * TYPE_BYTES[ty]), DTYPE["u" + ty[1:]]
    gets = [getter(ins.args[1], "u" + ty[1:], K)] + [getter(a, "u32", K) for a in ins.args[2:]]

    def fn(a, pos, n):
        pos, n = pos & U32(255), n & U32(255)
        one = dt(1)
        r = np.where(pos < w, a >> np.minimum(pos, w - U32(1)).astype(dt), dt(0))
        m = np.where(n < w, (one << np.minimum(n, w - U32(1)).astype(dt)) - one, ~dt(0))
        if ty[0] == "s":                              # beyond the field: copies of its top bit
            top = np.minimum(pos + n - U32(1), w - U32(1))
            r = (a.view(DTYPE[ty]) >> np.minimum(pos, w - U32(1)).astype(DTYPE[ty])).view(dt)
            r = np.where(((a >> top.astype(dt)) & one) == one, r | ~m, r & m)
            return np.where(n == 0, dt(0), r)
        return r & m
    return alu(ins, K, "u" + ty[1:], fn, gets=gets)


@op("bfi")
def _bfi(ins, K):
    ty = ins.parts[-1]
    w, dt = U32(8 * TYPE_BYTES[ty]), DTYPE[ty]
    gets = [getter(a, ty, K) for a in ins.args[1:3]] + [getter(a, "u32", K) for a in ins.args[3:]]

    def fn(a, b, pos, n):
        pos, n = pos & U32(255), n & U32(255)
        m = np.where(n < w, (dt(1) << np.minimum(n, w - U32(1)).astype(dt)) - dt(1), ~dt(0))
        p = np.minimum(pos, w - U32(1)).astype(dt)
        m = np.where(pos < w, m << p, dt(0))
        return (b & ~m) | ((a << p) & m)
    return alu(ins, K, ty, fn, gets=gets)


@op("bfind", "clz")
def _bfind(ins, K):
    ty = ins.parts[-1]
    w = 8 * TYPE_BYTES[ty]
    clz, shiftamt = ins.parts[0] == "clz", "shiftamt" in ins.parts

    def fn(a):
        if ty[0] == "s":
            a = np.where(a < 0, ~a, a)
        a = a.astype(U64)
        n = np.zeros(np.shape(a), np.int64) - 1
        for k in (32, 16, 8, 4, 2, 1):
            big = a >> U64(k) != 0
            n, a = n + np.where(big, k, 0), np.where(big, a >> U64(k), a)
        n = n + (a != 0)
        r = w - 1 - n if clz or shiftamt else n
        if shiftamt:
            r = np.where(n < 0, -1, r)
        return r.astype(np.int32).view(U32)
    return alu(ins, K, ty, fn, "u32")


@op("popc")
def _popc(ins, K):
    return alu(ins, K, ins.parts[-1], lambda a: np.bitwise_count(a).astype(U32), "u32")


@op("brev")
def _brev(ins, K):
    ty = ins.parts[-1]
    n, dt = TYPE_BYTES[ty], DTYPE[ty]
    rev = np.array([int(f"{i:08b}"[::-1], 2) for i in range(256)], U8)
    return alu(ins, K, ty, lambda a: rev[np.ascontiguousarray(np.atleast_1d(a)).view(U8)].reshape(-1, n)[:, ::-1]
               .copy().view(dt).reshape(-1))


@op("prmt")
def _prmt(ins, K):
    if ins.op != "prmt.b32":
        raise UnsupportedInstruction(ins.text)

    def fn(a, b, sel):
        v = b.astype(U64) << U64(32) | a.astype(U64)
        r = U32(0)
        for i in range(4):
            s = (sel >> U32(4 * i)).astype(U64)
            byte = (v >> ((s & U64(7)) << U64(3)) & U64(255)).astype(U32)
            ext = np.where(byte & U32(128), U32(255), U32(0))
            r = r | (np.where(s & U64(8), ext, byte) << U32(8 * i))
        return r
    return alu(ins, K, "b32", fn)


@op("szext", "bmsk")
def _szext(ins, K):
    if ins.parts[0] == "bmsk":
        def mask(a, b):
            a, b = (np.minimum(x, U32(32)).astype(U64) for x in (a, b))
            return ((((U64(1) << b) - U64(1)) << a) & U64(0xFFFFFFFF)).astype(U32)
        return alu(ins, K, "b32", mask)
    ty = ins.parts[-1]
    dt = DTYPE[ty]

    def fn(a, n):
        k = np.where(n >= 32, 0, 32 - n.astype(np.int64)) if "clamp" in ins.parts else (-n.astype(np.int64)) % 32
        r = a.astype(np.int64) << k
        r = (r.astype(U32).view(dt)).astype(np.int64) >> k
        return np.where(n == 0, 0, r).astype(U32).view(dt)
    return alu(ins, K, ty, fn, gets=[getter(ins.args[1], ty, K), getter(ins.args[2], "u32", K)])


@op("sad")
def _sad(ins, K):
    return alu(ins, K, ins.parts[-1], lambda a, b, z: np.where(a < b, b - a, a - b) + z)


@op("dp4a")
def _dp4a(ins, K):
    ta, tb = (np.int8 if t == "s32" else U8 for t in ins.parts[1:3])

    def fn(a, b, z):
        a, b = (np.ascontiguousarray(np.broadcast_to(x, np.shape(a + b))).view(t).reshape(-1, 4).astype(np.int32)
                for x, t in ((a, ta), (b, tb)))
        return (a * b).sum(1, dtype=np.int32).view(U32) + z
    return alu(ins, K, "b32", fn)


# ---- comparison, selection ------------------------------------------------------------------
COMPARE = {"eq": np.equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
           "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal, "ne": np.not_equal}


def comparison(cmp, is_float):
    if not is_float:
        return COMPARE[cmp]
    if cmp == "num":
        return lambda a, b: ~(np.isnan(a) | np.isnan(b))
    if cmp == "nan":
        return lambda a, b: np.isnan(a) | np.isnan(b)
    if cmp == "ne":
        return lambda a, b: (a < b) | (a > b)
    if cmp == "neu":
        return np.not_equal
    if cmp.endswith("u") and cmp[:-1] in COMPARE:
        f = COMPARE[cmp[:-1]]
        return lambda a, b: f(a, b) | np.isnan(a) | np.isnan(b)
    return COMPARE[cmp]


BOOLOPS = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}


@op("setp")
def _setp(ins, K):
    p, ty = ins.parts, ins.parts[-1]
    cmp = comparison(p[1], ty in FLOATS)
    comb = next((BOOLOPS[x] for x in p[2:] if x in BOOLOPS), None)
    a, b = (fget(x, ty, K, "ftz" in p) if ty in FLOATS else getter(x, ty, K) for x in ins.args[1:3])
    d = ins.args[0]
    s = setter(d.a if isinstance(d, Pair) else d, "pred")
    s2 = setter(d.b, "pred") if isinstance(d, Pair) else None
    third = getter(ins.args[3], "pred", K) if comb else None
    if s2 is None and comb is None:
        return lambda c: s(c, cmp(a(c), b(c)))

    def run(c):
        r = cmp(a(c), b(c))
        if ty.endswith("x2"):
            r, q = r[0::2], r[1::2]
        else:
            q = ~r
        if comb:
            z = third(c)
            r, q = comb(r, z), comb(q, z)
        s(c, np.ascontiguousarray(r))
        if s2:
            s2(c, np.ascontiguousarray(q))
    return run


@op("set")
def _set(ins, K):
    p, dty, ty = ins.parts, ins.parts[-2], ins.parts[-1]
    cmp = comparison(p[1], ty in FLOATS)
    if any(x in BOOLOPS for x in p[2:]) or ty.endswith("x2"):
        raise UnsupportedInstruction(ins.text)
    true = const(Imm(-1), dty) if dty[0] in "us" else (U16(0x3F80) if dty == "bf16" else DTYPE[dty](1))
    zero = DTYPE[dty](0)
    gets = [fget(x, ty, K) if ty in FLOATS else getter(x, ty, K) for x in ins.args[1:]]
    return alu(ins, K, ty, lambda a, b: np.where(cmp(a, b), true, zero), dty, gets)


@op("selp")
def _selp(ins, K):
    ty = "b" + str(8 * TYPE_BYTES[ins.parts[-1]])
    if any(isinstance(a, Imm) and a.bits for a in ins.args[1:3]):
        ty = ins.parts[-1]
    gets = [getter(ins.args[1], ty, K), getter(ins.args[2], ty, K), getter(ins.args[3], "pred", K)]
    return alu(ins, K, ty, lambda a, b, p: np.where(p, a, b), gets=gets)


@op("slct")
def _slct(ins, K):
    ty, ct = ins.parts[-2], ins.parts[-1]
    gets = [getter(ins.args[1], ty, K), getter(ins.args[2], ty, K), getter(ins.args[3], ct, K)]
    return alu(ins, K, ty, lambda a, b, x: np.where(x >= 0, a, b), gets=gets)


# ---- moves and conversions ------------------------------------------------------------------
@op("mov")
def _mov(ins, K):
    ty, d, a = ins.parts[-1], ins.args[0], ins.args[1]
    if isinstance(d, Vec):
        n = len(d.items)
        part = "b" + str(8 * TYPE_BYTES[ty] // n)
        g, sets = getter(a, ty, K), [setter(x, part) for x in d.items]
        dt = DTYPE[part]

        def unpack(c):
            v = np.ascontiguousarray(g(c)).reshape(-1).view(dt).reshape(-1, n)
            for k in range(n):
                sets[k](c, v[:, k].copy())
        return unpack
    if isinstance(a, Vec):
        n = len(a.items)
        part = "b" + str(8 * TYPE_BYTES[ty] // n)
        gets, s, dt = [getter(x, part, K) for x in a.items], setter(d, ty), DTYPE[ty]

        def pack(c):
            v = np.stack(np.broadcast_arrays(*[np.atleast_1d(g(c)) for g in gets]), 1)
            s(c, np.ascontiguousarray(v).view(dt).reshape(-1))
        return pack
    if isinstance(d, Reg) and d.ty != "pred":
        ty = ty if isinstance(a, Imm) else "b" + str(8 * TYPE_BYTES[ty])
    return alu(ins, K, ty, lambda v: v.copy())


@op("cvta")
def _cvta(ins, K):
    ty = ins.parts[-1]
    base = {"shared": SHARED_BASE, "local": LOCAL_BASE}.get(ins.parts[-2].split("::")[0], 0)
    delta = DTYPE[ty]((-base if "to" in ins.parts else base) % (1 << 64))
    return alu(ins, K, ty, lambda a: a + delta)


@op("isspacep")
def _isspacep(ins, K):
    lo = {"shared": SHARED_BASE, "local": LOCAL_BASE}.get(ins.parts[1].split("::")[0])
    if lo:
        return alu(ins, K, "u64", lambda a: a >> U64(32) == U64(lo >> 32), "pred",
                   [getter(ins.args[1], "u64", K)])
    return alu(ins, K, "u64", lambda a: a >= U64(0x7F0000000000), "pred", [getter(ins.args[1], "u64", K)])


def round_integral(x, p):
    for m, f in (("rni", np.rint), ("rzi", np.trunc), ("rmi", np.floor), ("rpi", np.ceil)):
        if m in p:
            return f(x)
    return x


@op("cvt")
def _cvt(ins, K):
    p = ins.parts
    dty, sty = p[-2], p[-1]
    mods = fmods(p)
    if dty.endswith("x2") or sty.endswith("x2"):
        return cvt_packed(ins, K, dty, sty, mods)
    if dty == "tf32":
        g, s = getter(ins.args[1], "f32", K), setter(ins.args[0], "b32")
        if "rna" in p:
            return lambda c: s(c, N.to_tf32(g(c)))

        def tf32_rn(c):
            b = g(c).view(U32)
            return s(c, (b if "rz" in p else b + U32(0xFFF) + ((b >> U32(13)) & U32(1))) & U32(0xFFFFE000))
        return tf32_rn
    if sty in FLOATS:
        g = fget(ins.args[1], sty, K, mods["ftz"])
        if dty in FLOATS:
            conv, s = fround(dty, **mods), setter(ins.args[0], dty)
            if dty == "f64":
                return lambda c: s(c, conv(round_integral(g(c).astype(F64), p)))
            return lambda c: s(c, conv(round_integral(g(c).copy(), p)))
        dt, s = DTYPE[dty], setter(ins.args[0], dty)
        m = next((x for x in ("rzi", "rni", "rmi", "rpi") if x in p), "rzi")
        return lambda c: s(c, N.float_to_int(np.atleast_1d(g(c)), dt, m))
    g = getter(ins.args[1], sty, K)
    s = setter(ins.args[0], dty)
    if dty in FLOATS:
        conv = fround(dty, **mods)
        big = TYPE_BYTES[sty] == 8 and mods["mode"] == "rn" and dty == "f32"
        return lambda c: s(c, conv(g(c).astype(F32 if big else F64)))
    dt = DTYPE[dty]
    if "sat" in p:
        info, src = np.iinfo(dt), np.iinfo(DTYPE[sty])
        lo, hi = max(info.min, src.min), min(info.max, src.max)
        return lambda c: s(c, np.clip(g(c), lo, hi).astype(dt))
    return lambda c: s(c, g(c).astype(dt))


def cvt_packed(ins, K, dty, sty, mods):
    """Two-element conversions: f32 pairs to f16x2/bf16x2/fp8x2, fp8x2 to f16x2, f16x2 to fp8x2."""
    s = setter(ins.args[0], "b" + str(8 * TYPE_BYTES[dty]))
    if sty == "f32":
        hi, lo = (fget(a, "f32", K, mods["ftz"]) for a in ins.args[1:3])
        fmt = dty[:-2]
        if fmt in N.FP8:
            conv, u, w = (lambda x: N.to_fp8(np.maximum(x, 0) if mods["relu"] else x, fmt)), U16, U16(8)
        else:
            conv, u, w = fround(fmt, **mods), U32, U32(16)

        def run(c):
            bits = [conv(np.atleast_1d(g(c))) for g in (hi, lo)]
            bits = [(b if b.dtype in (U8, U16) else b.view(U16)).astype(u) for b in bits]
            s(c, bits[0] << w | bits[1])
        return run
    if sty[:-2] in N.FP8:
        g, table = getter(ins.args[1], "b16", K), N.FP8[sty[:-2]].astype(F32)
        conv = fround(dty)
        return lambda c: s(c, conv(table[np.atleast_1d(g(c)).view(U8)]).view(U32))
    if dty[:-2] in N.FP8 and sty in ("f16x2", "bf16x2"):
        g = fget(ins.args[1], sty, K)
        return lambda c: s(c, N.to_fp8(g(c), dty[:-2]).view(U16))
    raise UnsupportedInstruction(ins.text)


# ---- memory ---------------------------------------------------------------------------------
SPACES = ("global", "shared", "local", "const", "param")
STRONG = {"volatile", "relaxed", "acquire", "cg", "cv", "mmio", "release", "acq_rel"}


def qualifiers(ins):
    """(space, vector length, element type, strong?)"""
    parts = [x.split("::")[0] for x in ins.parts]
    space = next((s for s in SPACES if s in parts), "generic")
    n = next((int(x[1:]) for x in parts if x in ("v2", "v4", "v8")), 1)
    return space, n, ins.parts[-1], bool(STRONG & set(parts))


def address(a, K):
    """Getter of the active threads' addresses as an int64 array (one per active thread)."""
    base, off = a.base, a.off
    if isinstance(base, Reg):
        i = base.idx

        def run(c):
            sel = c.sel()
            r = c.R[i] if sel is None else c.R[i].take(sel)
            r = r.astype(np.int64)
            return r + off if off else r
        return run
    v = np.int64(base.value if isinstance(base, Imm) else K.address(base)) + off
    return lambda c: np.full(c.count(), v)


@op("ld", "ldu")
def _ld(ins, K):
    space, n, ty, strong = qualifiers(ins)
    eb, a = TYPE_BYTES[ty], ins.args[1]
    dsts = ins.args[0].items if isinstance(ins.args[0], Vec) else (ins.args[0],)
    sets = [mem_setter(d, ty) for d in dsts]
    if isinstance(a.base, Sym) and a.base.space == "local":
        space = "local"
    if isinstance(a.base, Sym) and a.base.space == "param":
        off, dt = K.address(a.base) + a.off, DTYPE["b" + str(8 * eb)]

        def ldparam(c):
            v = c.params[off:off + eb * n].view(dt)
            for k in range(n):
                sets[k](c, np.full(c.count(), v[k]))
        return ldparam
    addr = address(a, K)

    def run(c):
        v = c.load(space, addr(c), eb, n, c.sel(), strong)
        if n == 1:
            sets[0](c, v if v.ndim == 1 else v[:, 0])
        else:
            for k in range(n):
                sets[k](c, v[:, k].copy())
    return run


def mem_setter(d, ty):
    """Writes loaded bits (one value per active thread) to a register."""
    if d is None:
        return lambda c, v: None
    i, have, size = d.idx, TYPE_BYTES[d.ty], TYPE_BYTES[ty]
    u = UNSIGNED[have]

    def put(c, v):
        if have != size:
            v = (v.view(DTYPE[ty]) if ty[0] == "s" else v).astype(np.dtype(f"{'i' if ty[0] == 's' else 'u'}{have}"))
        v = v.view(u)
        sel = c.sel()
        if sel is None:
            c.R[i] = v
        else:
            c.R[i][sel] = v
    return put


def mem_getter(o, ty, K):
    """Values of the active threads, as unsigned bits."""
    u = UNSIGNED[TYPE_BYTES[ty]]
    g = getter(o, "b" + str(8 * TYPE_BYTES[ty]), K)
    if isinstance(o, Reg):
        i = o.idx

        def run(c):
            sel = c.sel()
            return (c.R[i] if sel is None else c.R[i].take(sel)).astype(u, copy=False)
        return run
    return lambda c: np.full(c.count(), g(c))


@op("st")
def _st(ins, K):
    space, n, ty, strong = qualifiers(ins)
    eb, a = TYPE_BYTES[ty], ins.args[0]
    if space == "param" or (isinstance(a.base, Sym) and a.base.space == "local"):
        space = "local"
    srcs = ins.args[1].items if isinstance(ins.args[1], Vec) else (ins.args[1],)
    if isinstance(ins.args[1], Imm) and ins.args[1].bits:
        srcs = (Imm(ins.args[1].value),)
    gets, addr = [mem_getter(x, ty, K) for x in srcs], address(a, K)

    def run(c):
        v = [g(c) for g in gets]
        c.store(space, addr(c), v[0] if n == 1 else np.stack(v, 1), eb, n, c.sel(), strong)
    return run


def combine(opname, ty):
    """Binary function of an atomic operation on typed arrays."""
    if "f16" in ty:
        conv, f = fround(ty), {"add": np.add, "min": np.fmin, "max": np.fmax}[opname]
        up = N.bf16_to_f32 if ty.startswith("bf") else (lambda x: x.astype(F32))
        dt = DTYPE[ty]
        return lambda a, b: conv(f(up(a.view(dt)), up(b.view(dt)))).view(a.dtype)
    return {"add": np.add, "min": np.fmin if ty[0] == "f" else np.minimum,
            "max": np.fmax if ty[0] == "f" else np.maximum, "and": np.bitwise_and, "or": np.bitwise_or,
            "xor": np.bitwise_xor, "exch": lambda a, b: b,
            "inc": lambda a, b: np.where(a >= b, a.dtype.type(0), a + a.dtype.type(1)),
            "dec": lambda a, b: np.where((a == 0) | (a > b), b, a - a.dtype.type(1))}[opname]


@op("atom", "red")
def _atom(ins, K):
    space, n, ty, _ = qualifiers(ins)
    isred = ins.parts[0] == "red"
    args = ins.args if isred else ins.args[1:]
    name = next(x for x in ins.parts if x in ("add", "min", "max", "and", "or", "xor", "exch", "cas", "inc", "dec"))
    eb, dt = TYPE_BYTES[ty], UNSIGNED[TYPE_BYTES[ty]] if "f16" in ty else DTYPE[ty]
    if eb > 8:
        raise UnsupportedInstruction(ins.text)
    addr = address(args[0], K)
    cols = [x.items if isinstance(x, Vec) else (x,) for x in args[1:3 if name == "cas" else 2]]
    gets = [[mem_getter(Imm(x.value) if isinstance(x, Imm) and x.bits else x, ty, K) for x in col] for col in cols]
    dst = [None] * n if isred else (ins.args[0].items if isinstance(ins.args[0], Vec) else [ins.args[0]])
    sets = [mem_setter(d, ty) for d in dst]
    fn = None if name == "cas" else combine(name, ty)

    def run(c):
        at, sel = addr(c), c.sel()
        for k in range(n):
            vals = [g[k](c).view(dt) for g in gets]
            old = c.atomic(space, at + k * eb, vals, fn, eb, dt, sel, name)
            sets[k](c, old.view(UNSIGNED[eb]))
    return run


@op("cp")
def _cp(ins, K):
    p = ins.parts
    if p[1] != "async" or "bulk" in p or "mbarrier" in p:
        raise UnsupportedInstruction(ins.text)
    if "commit_group" in p:
        return lambda c: c.cp_commit()
    if "wait_group" in p:
        n = ins.args[0].value
        return lambda c: c.cp_wait(n)
    if "wait_all" in p:
        return lambda c: (c.cp_commit(), c.cp_wait(0))[1]
    dst, src = address(ins.args[0], K), address(ins.args[1], K)
    size = ins.args[2].value
    given = mem_getter(ins.args[3], "b32", K) if len(ins.args) > 3 and not (
        isinstance(ins.args[3], Reg) and ins.args[3].ty in ("b64", "u64", "pred")) else None
    return lambda c: c.cp_async(dst(c), src(c), size, None if given is None else given(c), c.sel())


@op("ldmatrix", "stmatrix")
def _ldmatrix(ins, K):
    if "m8n8" not in ins.parts or ins.parts[-1] != "b16":
        raise UnsupportedInstruction(ins.text)
    n = next(int(x[1]) for x in ins.parts if x in ("x1", "x2", "x4"))
    trans, load = "trans" in ins.parts, ins.parts[0] == "ldmatrix"
    a, v = (ins.args[1], ins.args[0]) if load else (ins.args[0], ins.args[1])
    regs = [r.idx for r in (v.items if isinstance(v, Vec) else (v,))]
    base, off = a.base, a.off
    fixed = None if isinstance(base, Reg) else np.int64(base.value if isinstance(base, Imm) else K.address(base))

    def run(c):
        rows, threads = c.full_warps()
        addr = c.R[base.idx].astype(np.int64) if fixed is None else np.full(c.T, fixed)
        addr = addr.reshape(-1, 32)[rows] + off
        for m in range(n):
            at, who = addr[:, 8 * m:8 * m + 8].reshape(-1), threads[:, 8 * m:8 * m + 8].reshape(-1)
            if load:
                x = c.load("shared", at, 2, 8, who, False).reshape(-1, 8, 8)
                x = np.ascontiguousarray(x.transpose(0, 2, 1) if trans else x).view(U32).reshape(-1)
                c.R[regs[m]][threads.reshape(-1)] = x
            else:
                x = np.ascontiguousarray(c.R[regs[m]].reshape(-1, 32)[rows]).view(U16).reshape(-1, 8, 8)
                x = x.transpose(0, 2, 1) if trans else x
                c.store("shared", at, np.ascontiguousarray(x).reshape(-1, 8), 2, 8, who, False)
    return run


# ---- tensor core ----------------------------------------------------------------------------
def mma_layout(m, k, eb):
    """Row/column index arrays (lane, element) of the A, B and C fragments of m16n8k*."""
    g, t = LANES[:, None] >> 2, LANES[:, None] & 3
    per = 4 // eb                                       # elements per 32-bit register
    na, nb = 16 * k // 32, 8 * k // 32
    i = np.arange(na)[None, :]
    r, j = i // per, i % per
    a_row, a_col = g + 8 * (r & 1), t * per + j + 4 * per * (r >> 1)
    i = np.arange(nb)[None, :]
    b_row, b_col = t * per + i % per + 4 * per * (i // per), g + 0 * i
    i = np.arange(4)[None, :]
    c_row, c_col = g + 8 * (i >> 1), t * 2 + (i & 1)
    return (a_row, a_col), (b_row, b_col), (c_row, c_col)


@op("mma")
def _mma(ins, K):
    p = ins.parts
    shape = next((x for x in p if x.startswith("m16n8k")), None)
    dty, aty, bty, cty = p[-4:]
    eb = {"f16": 2, "bf16": 2, "tf32": 4, "s8": 1, "u8": 1, "e4m3": 1, "e5m2": 1}.get(aty)
    if shape is None or eb is None or "sp" in p or "block_scale" in p or p[-5:-4] == ["satfinite"]:
        raise UnsupportedInstruction(ins.text)
    k = int(shape[6:])
    (ar, ac), (br, bc), (cr, cc) = mma_layout(16, k, eb)
    D, A, B, C = [a.items for a in ins.args[:4]]

    def frag(c, regs, ty, rows):
        cols = [c.R[r.idx] if isinstance(r, Reg) else np.full(c.T, r.value, U32) for r in regs]
        x = np.stack(cols, 1).reshape(-1, 32, len(regs))[rows]
        if ty == "tf32":
            return (x & U32(0xFFFFE000)).view(F32).astype(F64)
        if ty == "bf16":
            return N.bf16_to_f32(x.view(U16)).astype(F64)
        if ty in N.FP8:
            return N.FP8[ty][x.view(U8)]
        return x.view({"f16": F16, "f32": F32, "s8": np.int8, "u8": U8, "s32": np.int32}[ty]).astype(F64)

    def run(c):
        rows, threads = c.full_warps()
        a, b, z = frag(c, A, aty, rows), frag(c, B, bty, rows), frag(c, C, cty, rows)
        ma, mb = np.empty((len(a), 16, k)), np.empty((len(a), k, 8))
        ma[:, ar, ac] = a
        mb[:, br, bc] = b
        d = np.matmul(ma, mb)[:, cr, cc] + z
        d = d.astype({"f32": F32, "f16": F16, "s32": np.int32}[dty])
        d = np.ascontiguousarray(d).view(U32).reshape(-1, len(D))
        t = threads.reshape(-1)
        for i, r in enumerate(D):
            c.R[r.idx][t] = d[:, i]
    return run


# ---- warp-level operations ------------------------------------------------------------------
def whole(c, g):
    """Evaluate an operand for every thread of the batch, as (warps, 32)."""
    mode, c.mode = c.mode, 0
    v = np.broadcast_to(g(c), (c.T,)).reshape(-1, 32)
    c.mode = mode
    return v


def put_whole(c, d, v):
    """Write a (warps, 32) array to the active threads."""
    if d is None:
        return
    v = np.ascontiguousarray(v).reshape(-1)
    if c.mode == 0:
        c.R[d.idx] = v if v.flags.owndata else v.copy()
    else:
        sel = c.sel()
        c.R[d.idx][sel] = v[sel]


@op("shfl")
def _shfl(ins, K):
    how = next(x for x in ins.parts if x in ("up", "down", "bfly", "idx"))
    d = ins.args[0]
    d, dp = (d.a, d.b) if isinstance(d, Pair) else (d, None)
    g, gb, gc = (getter(a, "b32", K) for a in ins.args[1:4])
    lane = LANES[None, :]

    def run(c):
        v, b, cv = whole(c, g), (whole(c, gb) & U32(31)).astype(int), whole(c, gc).astype(int)
        seg = cv >> 8 & 31
        lo = lane & seg
        hi = lo | (cv & 31 & ~seg)
        j = {"up": lane - b, "down": lane + b, "bfly": lane ^ b, "idx": lo | (b & ~seg)}[how]
        ok = j >= hi if how == "up" else j <= hi
        j = np.where(ok, j, lane)
        act = c.active()
        if act is not None:
            c.check_shuffle(act & ~np.take_along_axis(act, j, 1))
        put_whole(c, d, np.take_along_axis(v, j, 1))
        if dp is not None:
            put_whole(c, dp, np.broadcast_to(ok, v.shape).copy())
    static = all(isinstance(a, Imm) for a in ins.args[2:4])
    if not static:
        return run
    class One:                                        # constant lane map: computed once
        T, mode = 32, 0
    b, cv = int(gb(One)) & 31, int(gc(One))
    seg = cv >> 8 & 31
    lo = LANES & seg
    hi = lo | (cv & 31 & ~seg)
    j = {"up": LANES - b, "down": LANES + b, "bfly": LANES ^ b, "idx": lo | (b & ~seg)}[how]
    ok = j >= hi if how == "up" else j <= hi
    j = np.where(ok, j, LANES)

    def fast(c):
        act = c.active()
        if act is not None:
            c.check_shuffle(act & ~act[:, j])
        put_whole(c, d, whole(c, g).take(j, axis=1))
        if dp is not None:
            put_whole(c, dp, np.broadcast_to(ok, (c.T // 32, 32)).copy())
    return fast


def members(c, gmask):
    """(warps, 32): active lanes that are in the member mask."""
    m = (whole(c, gmask) >> LANES.astype(U32) & U32(1)).astype(bool)
    act = c.active()
    return m if act is None else m & act


def spread(x):
    return np.repeat(x[:, None], 32, 1)


@op("vote")
def _vote(ins, K):
    how = ins.parts[2]
    g, gm = getter(ins.args[1], "pred", K), getter(ins.args[2], "b32", K)

    def run(c):
        p, m = whole(c, g), members(c, gm)
        if how == "ballot":
            r = ((p & m).astype(U32) << LANES.astype(U32)).sum(1, dtype=U32)
        else:
            al, an = (p | ~m).all(1), (p & m).any(1)
            r = {"all": al, "any": an, "uni": al | ~an}[how]
        put_whole(c, ins.args[0], spread(r))
    return run


@op("activemask")
def _activemask(ins, K):
    def run(c):
        act = c.active()
        m = np.full(c.T // 32, 0xFFFFFFFF, U32) if act is None else (act.astype(U32) << LANES.astype(U32)).sum(1, dtype=U32)
        put_whole(c, ins.args[0], spread(m))
    return run


@op("match")
def _match(ins, K):
    ty = ins.parts[-1]
    d = ins.args[0]
    d, dp = (d.a, d.b) if isinstance(d, Pair) else (d, None)
    g, gm = getter(ins.args[1], ty, K), getter(ins.args[2], "b32", K)

    def run(c):
        v, m = whole(c, g), members(c, gm)
        eq = (v[:, :, None] == v[:, None, :]) & m[:, None, :]
        r = (eq.astype(U32) << LANES.astype(U32)).sum(2, dtype=U32)
        if ins.parts[1] == "all":
            ok = (eq | ~m[:, None, :]).all(2)
            r = np.where(ok, r, U32(0))
            put_whole(c, dp, ok)
        put_whole(c, d, r)
    return run


@op("redux")
def _redux(ins, K):
    how, ty = ins.parts[2], ins.parts[-1]
    g, gm = getter(ins.args[1], ty, K), getter(ins.args[2], "b32", K)
    dt = DTYPE[ty]
    ext = (dt(np.inf), dt(-np.inf)) if ty == "f32" else (dt(np.iinfo(dt).max), dt(np.iinfo(dt).min))
    fn, unit = {"add": (np.add, dt(0)), "and": (np.bitwise_and, ~dt(0) if ty != "f32" else 0),
                "or": (np.bitwise_or, dt(0)), "xor": (np.bitwise_xor, dt(0)),
                "min": (np.minimum, ext[0]), "max": (np.maximum, ext[1])}[how]
    if ty == "f32":
        fn = {("min", 0): np.fmin, ("max", 0): np.fmax, ("min", 1): np.minimum, ("max", 1): np.maximum}[how, "NaN" in ins.parts]

    def run(c):
        v = whole(c, g)
        v = np.abs(v) if "abs" in ins.parts else v
        r = fn.reduce(np.where(members(c, gm), v, unit), axis=1, dtype=dt)
        put_whole(c, ins.args[0], spread(r).view(U32))
    return run


@op("elect")
def _elect(ins, K):
    d, gm = ins.args[0], getter(ins.args[1], "b32", K)

    def run(c):
        lead = members(c, gm).argmax(1)
        put_whole(c, d.a, spread(lead.astype(U32)))
        put_whole(c, d.b, LANES[None, :] == lead[:, None])
    return run


# ---- no effect here -------------------------------------------------------------------------
@op("membar", "fence", "prefetch", "prefetchu", "nanosleep", "griddepcontrol", "discard", "applypriority",
    "pmevent", "setmaxnreg")
def _nop(ins, K):
    return lambda c: None


@op("createpolicy")
def _policy(ins, K):
    s = setter(ins.args[0], "b64")
    return lambda c: s(c, U64(0))


@op("trap", "brkpt")
def _trap(ins, K):
    return lambda c: c.fail("trap executed", 0, error=DeviceAssert)


@op("assertfail")
def _assertfail(ins, K):
    gets = [mem_getter_local(a) for a in ins.args]
    return lambda c: c.assert_failed(gets)


def mem_getter_local(sym):
    return sym.off if isinstance(sym, Sym) else None


def decode(ins, K):
    """Closure for an instruction, wrapped in its predicate."""
    base = ins.parts[0]
    f = HANDLERS.get(base)
    if f is None or any(isinstance(a, Label) for a in ins.args):
        raise UnsupportedInstruction(ins.text)
    try:
        run = f(ins, K)
    except UnsupportedInstruction:
        raise
    except Exception as e:
        raise UnsupportedInstruction(f"{ins.text}  ({type(e).__name__}: {e})") from e
    if ins.pred is None:
        return run
    i, neg = ins.pred[0].idx, ins.pred[1]

    def predicated(c):
        saved = c.narrow(i, neg)
        if saved is None:
            return
        if saved is True:
            run(c)
            return
        try:
            run(c)
        finally:
            c.set_act(saved)
    return predicated
