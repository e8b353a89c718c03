import numpy as np
import pytest
from util import ptx_map

RNG = np.random.default_rng(0)
EDGE = {16: [0, 1, 2, 0x7FFF, 0x8000, 0xFFFF, 0x1234], 32: [0, 1, 2, 31, 32, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF],
        64: [0, 1, 63, 64, 2**63 - 1, 2**63, 2**64 - 1, 0xFFFFFFFF]}


def data(w, n=128, k=2):
    """k arrays of n patterns: all pairs of edge values, then random ones."""
    e = np.array(EDGE[w], np.uint64)
    pairs = np.stack(np.meshgrid(*[e] * 2), -1).reshape(-1, 2)
    out = []
    for i in range(k):
        v = RNG.integers(0, 2**63, n, np.uint64) * np.uint64(2) + RNG.integers(0, 2, n).astype(np.uint64)
        v >>= RNG.integers(0, w, n).astype(np.uint64) if i % 2 else np.uint64(0)
        m = min(len(pairs), n)
        v[:m] = pairs[:m, i % 2]
        out.append(v.astype(f"u{w // 8}"))
    return out


def val(x, ty):
    x, w = int(x), int(ty[1:])
    x &= (1 << w) - 1
    return x - (1 << w) if ty[0] == "s" and x >> (w - 1) else x


def tdiv(a, b):
    q = abs(a) // abs(b)
    return q if (a < 0) == (b < 0) else -q


BINARY = {"add": lambda a, b, w: a + b, "sub": lambda a, b, w: a - b, "mul.lo": lambda a, b, w: a * b,
          "mul.hi": lambda a, b, w: a * b >> w, "min": lambda a, b, w: min(a, b), "max": lambda a, b, w: max(a, b),
          "div": lambda a, b, w: tdiv(a, b) if b else -1, "rem": lambda a, b, w: a - b * tdiv(a, b) if b else a}


@pytest.mark.parametrize("ty", ["s16", "u16", "s32", "u32", "s64", "u64"])
@pytest.mark.parametrize("op", list(BINARY))
def test_binary(op, ty):
    w = int(ty[1:])
    a, b = data(w)
    got = ptx_map(f"{op}.{ty} %o0, %i0, %i1;", [a, b], [a.dtype])
    want = [BINARY[op](val(x, ty), val(y, ty), w) % (1 << w) for x, y in zip(a, b)]
    if op in ("div", "rem"):                 # INT_MIN / -1 overflows: unspecified
        skip = [val(x, ty) == -(1 << w - 1) and val(y, ty) == -1 for x, y in zip(a, b)]
        got, want = got[~np.array(skip)], [v for v, s in zip(want, skip) if not s]
    assert [int(v) for v in got] == want


@pytest.mark.parametrize("ty", ["s16", "u16", "s32", "u32"])
def test_wide(ty):
    w = int(ty[1:])
    a, b = data(w)
    c = data(2 * w)[0]
    m, s = ptx_map(f"mul.wide.{ty} %o0, %i0, %i1; mad.wide.{ty} %o1, %i0, %i1, %i2;", [a, b, c],
                   [f"u{w // 4}", f"u{w // 4}"])
    p = [val(x, ty) * val(y, ty) for x, y in zip(a, b)]
    assert [int(v) for v in m] == [v % (1 << 2 * w) for v in p]
    assert [int(v) for v in s] == [(v + int(z)) % (1 << 2 * w) for v, z in zip(p, c)]


@pytest.mark.parametrize("ty", ["s16", "u16"])
@pytest.mark.parametrize("op", ["add", "min", "max"])
def test_packed_pairs(op, ty):
    """Two 16-bit operations in a 32-bit register, without a carry from the lower to the upper one."""
    a, b = data(32)
    got = ptx_map(f"{op}.{ty}x2 %o0, %i0, %i1;", [a, b], [np.uint32])
    for x, y, r in zip(*(v.view(np.uint16) for v in (a, b, got))):
        assert r == BINARY[op](val(x, ty), val(y, ty), 16) % 2**16, (op, ty, hex(x), hex(y))


def test_mad_lo_hi():
    a, b, c = data(32, k=3)
    lo, hi = ptx_map("mad.lo.s32 %o0, %i0, %i1, %i2; mad.hi.s32 %o1, %i0, %i1, %i2;", [a, b, c], ["u4", "u4"])
    p = [val(x, "s32") * val(y, "s32") for x, y in zip(a, b)]
    assert [int(v) for v in lo] == [(v + int(z)) % 2**32 for v, z in zip(p, c)]
    assert [int(v) for v in hi] == [((v >> 32) + int(z)) % 2**32 for v, z in zip(p, c)]


@pytest.mark.parametrize("w", [16, 32, 64])
def test_logic_and_shift(w):
    a, b = data(w)
    n = (RNG.integers(0, 2 * w, len(a))).astype(np.uint32)
    outs = ptx_map(f"and.b{w} %o0, %i0, %i1; or.b{w} %o1, %i0, %i1; xor.b{w} %o2, %i0, %i1; not.b{w} %o3, %i0;"
                   f"shl.b{w} %o4, %i0, %i2; shr.u{w} %o5, %i0, %i2; shr.s{w} %o6, %i0, %i2; shl.b{w} %o7, %i0, 5;",
                   [a, b, n], [a.dtype] * 8)
    x, y, k = ([int(v) for v in z] for z in (a, b, n))
    m = (1 << w) - 1
    want = [[p & q for p, q in zip(x, y)], [p | q for p, q in zip(x, y)], [p ^ q for p, q in zip(x, y)],
            [~p & m for p in x], [p << j & m for p, j in zip(x, k)], [p >> j for p, j in zip(x, k)],
            [val(p, f"s{w}") >> j & m for p, j in zip(x, k)], [p << 5 & m for p in x]]
    for g, e in zip(outs, want):
        assert [int(v) for v in g] == e


@pytest.mark.parametrize("ty", ["s32", "u32", "s64", "u64"])
def test_bfe_bfi(ty):
    w = int(ty[1:])
    a, b = data(w)
    pos, n = RNG.integers(0, w + 10, 128).astype("u4"), RNG.integers(0, w + 10, 128).astype("u4")
    got, ins = ptx_map(f"bfe.{ty} %o0, %i0, %i2, %i3; bfi.b{w} %o1, %i0, %i1, %i2, %i3;", [a, b, pos, n],
                       [a.dtype] * 2)

    def bfe(x, p, k):                         # as in the PTX manual
        x = int(x)
        sign = 0 if ty[0] == "u" or k == 0 else x >> min(p + k - 1, w - 1) & 1
        return sum((x >> p + i & 1 if i < k and p + i < w else sign) << i for i in range(w))

    def bfi(x, y, p, k):
        x, f = int(x), int(y)
        for i in range(k):
            if p + i < w:
                f = f & ~(1 << p + i) | (x >> i & 1) << p + i
        return f
    assert [int(v) for v in got] == [bfe(x, int(p), int(k)) for x, p, k in zip(a, pos, n)]
    assert [int(v) for v in ins] == [bfi(x, y, int(p), int(k)) for x, y, p, k in zip(a, b, pos, n)]


@pytest.mark.parametrize("w", [32, 64])
def test_bit_counts(w):
    a = data(w, k=2)[1]
    o = ptx_map(f"clz.b{w} %o0, %i0; popc.b{w} %o1, %i0; bfind.u{w} %o2, %i0; bfind.s{w} %o3, %i0; brev.b{w} %o4, %i0;"
                f"bfind.shiftamt.u{w} %o5, %i0;", [a], ["u4", "u4", "i4", "i4", a.dtype, "i4"])
    x = [int(v) for v in a]
    assert list(o[0]) == [w - v.bit_length() for v in x]
    assert list(o[1]) == [v.bit_count() for v in x]
    assert list(o[2]) == [v.bit_length() - 1 for v in x]
    sx = [val(v, f"s{w}") for v in x]
    assert list(o[3]) == [(v if v >= 0 else ~v).bit_length() - 1 for v in sx]
    assert [int(v) for v in o[4]] == [int(f"{v:0{w}b}"[::-1], 2) for v in x]
    assert list(o[5]) == [w - v.bit_length() if v else -1 for v in x]


@pytest.mark.parametrize("lut", [0x00, 0x80, 0x96, 0xE8, 0xCA, 0x3F, 0xFF])
def test_lop3(lut):
    a, b, c = data(32, k=3)
    got = ptx_map(f"lop3.b32 %o0, %i0, %i1, %i2, {lut};", [a, b, c], ["u4"])
    want = [sum((lut >> (4 * (x >> i & 1) + 2 * (y >> i & 1) + (z >> i & 1)) & 1) << i for i in range(32))
            for x, y, z in zip(*([int(v) for v in q] for q in (a, b, c)))]
    assert [int(v) for v in got] == want


def test_prmt_shf_szext():
    a, b = data(32)
    s = RNG.integers(0, 65536, 128).astype("u4")
    o = ptx_map("prmt.b32 %o0, %i0, %i1, %i2; prmt.b32 %o1, %i0, %i1, 0x5410; shf.l.wrap.b32 %o2, %i0, %i1, %i2;"
                "shf.r.clamp.b32 %o3, %i0, %i1, %i2; shf.r.wrap.b32 %o4, %i0, %i1, 7; ", [a, b, s], ["u4"] * 5)

    def prmt(x, y, sel):
        v, r = (y << 32 | x), 0
        for i in range(4):
            k = sel >> 4 * i & 15
            byte = v >> 8 * (k & 7) & 255
            r |= ((255 if byte & 128 else 0) if k & 8 else byte) << 8 * i
        return r
    x, y, k = ([int(v) for v in q] for q in (a, b, s))
    assert [int(v) for v in o[0]] == [prmt(p, q, j) for p, q, j in zip(x, y, k)]
    assert [int(v) for v in o[1]] == [prmt(p, q, 0x5410) for p, q in zip(x, y)]
    assert [int(v) for v in o[2]] == [((q << 32 | p) << (j & 31) >> 32) & 0xFFFFFFFF for p, q, j in zip(x, y, k)]
    assert [int(v) for v in o[3]] == [(q << 32 | p) >> min(j, 32) & 0xFFFFFFFF for p, q, j in zip(x, y, k)]
    assert [int(v) for v in o[4]] == [(q << 32 | p) >> 7 & 0xFFFFFFFF for p, q in zip(x, y)]


@pytest.mark.parametrize("ty,w", [("s32", 32), ("u32", 32), ("s16", 16), ("u64", 64)])
def test_setp_selp(ty, w):
    a, b = data(w)
    ops = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
    body = "".join(f"setp.{op}.{ty} %o{i}, %i0, %i1;" for i, op in enumerate(ops))
    got = ptx_map(body, [a, b], [bool] * 6)
    for g, op in zip(got, ops.values()):
        assert [bool(v) for v in g] == [eval(f"p {op} q") for p, q in
                                        zip([val(v, ty) for v in a], [val(v, ty) for v in b])]


def test_setp_pair_combine_and_slct():
    a, b = data(32)
    o = ptx_map("setp.gt.u32 %p1, %i0, 100; setp.lt.and.s32 %o0|%o1, %i0, %i1, !%p1; selp.b32 %o2, %i0, %i1, %p1;"
                "slct.u32.s32 %o3, %i0, %i1, %i1; setp.eq.xor.u32 %o4, %i0, %i1, %p1;", [a, b],
                [bool, bool, "u4", "u4", bool])
    p = a > 100
    lt = a.view("i4") < b.view("i4")
    assert (o[0] == (lt & ~p)).all() and (o[1] == (~lt & ~p)).all()
    assert (o[2] == np.where(p, a, b)).all()
    assert (o[3] == np.where(b.view("i4") >= 0, a, b)).all()
    assert (o[4] == ((a == b) ^ p)).all()


def test_cvt_integers():
    a = data(32)[0]
    o = ptx_map("cvt.u64.u32 %o0, %i0; cvt.s64.s32 %o1, %i0; cvt.u16.u32 %o2, %i0; cvt.s32.s8 %o3, %i0;"
                "cvt.sat.s8.s32 %o4, %i0; cvt.sat.u16.s32 %o5, %i0; cvt.u32.u8 %o6, %i0; cvt.sat.u32.s32 %o7, %i0;",
                [a], ["u8", "i8", "u2", "i4", "i4", "u2", "u4", "u4"])
    s = a.view("i4")
    assert (o[0] == a).all() and (o[1] == s).all() and (o[2] == a.astype("u2")).all()
    assert (o[3] == a.astype("u1").view("i1")).all() and (o[4] == np.clip(s, -128, 127)).all()
    assert (o[5] == np.clip(s, 0, 65535)).all() and (o[6] == (a & 255)).all() and (o[7] == np.maximum(s, 0)).all()


def test_carry_chain():
    a, b = data(64)
    got, sub = ptx_map("mov.b64 {%r1, %r2}, %i0; mov.b64 {%r3, %r4}, %i1; add.cc.u32 %r5, %r1, %r3;"
                       "addc.u32 %r6, %r2, %r4; mov.b64 %o0, {%r5, %r6}; sub.cc.u32 %r5, %r1, %r3;"
                       "subc.u32 %r6, %r2, %r4; mov.b64 %o1, {%r5, %r6};", [a, b], ["u8", "u8"])
    assert (got == a + b).all() and (sub == a - b).all()


def test_misc_integer():
    a, b, c = data(32, k=3)
    o = ptx_map("abs.s32 %o0, %i0; neg.s32 %o1, %i0; sad.u32 %o2, %i0, %i1, %i2; add.sat.s32 %o3, %i0, %i1;"
                "cnot.b32 %o4, %i0; mul24.lo.s32 %o5, %i0, %i1; dp4a.s32.s32 %o6, %i0, %i1, %i2;"
                "dp4a.u32.u32 %o7, %i0, %i1, %i2;", [a, b, c], ["i4", "i4", "u4", "i4", "u4", "u4", "u4", "u4"])
    s, t = a.view("i4").astype("i8"), b.view("i4").astype("i8")
    assert (o[0] == np.abs(a.view("i4"))).all() and (o[1] == -a.view("i4")).all()
    assert (o[2] == np.where(a < b, b - a, a - b) + c).all()
    assert (o[3] == np.clip(s + t, -2**31, 2**31 - 1)).all() and (o[4] == (a == 0)).all()
    lo = [((val(x & 0xFFFFFF, "s24") * val(y & 0xFFFFFF, "s24")) % 2**32) for x, y in zip(a, b)]
    assert [int(v) for v in o[5]] == lo
    for g, dt in ((o[6], "i1"), (o[7], "u1")):
        p = (a.view(dt).reshape(-1, 4).astype(int) * b.view(dt).reshape(-1, 4)).sum(1) + c.astype(int)
        assert (g == (p % 2**32)).all()
