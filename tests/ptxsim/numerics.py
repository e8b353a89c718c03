"""Number formats and rounding on numpy arrays (bit patterns are unsigned integer arrays)."""
import numpy as np

U8, U16, U32, U64 = np.uint8, np.uint16, np.uint32, np.uint64
F16, F32, F64 = np.float16, np.float32, np.float64
UNSIGNED = {1: U8, 2: U16, 4: U32, 8: U64}
DTYPE = {"f16": F16, "f32": F32, "f64": F64, "tf32": F32, "f16x2": F16, "f32x2": F32}
for _w in (8, 16, 32, 64):
    DTYPE[f"b{_w}"] = DTYPE[f"u{_w}"] = np.dtype(f"u{_w // 8}").type
    DTYPE[f"s{_w}"] = np.dtype(f"i{_w // 8}").type
DTYPE.update(bf16=U16, bf16x2=U16, u16x2=U16, s16x2=np.int16, b1=bool, pred=bool)
TINY32 = F32(np.finfo(F32).tiny)


def bf16_to_f32(b):
    return (b.astype(U32) << U32(16)).view(F32)


def f32_to_bf16(x, mode="rn"):
    b = np.ascontiguousarray(x, F32).view(U32)
    if mode == "rz":
        r = b >> U32(16)
    elif mode == "rn":
        r = (b + U32(0x7FFF) + ((b >> U32(16)) & U32(1))) >> U32(16)
    else:
        down = (b >> U32(31)) == (1 if mode == "rm" else 0)       # rounds away from zero
        r = (b + np.where(down, U32(0xFFFF), U32(0))) >> U32(16)
    return np.where(np.isnan(x), U16(0x7FFF), r.astype(U16))


def to_odd32(x):
    """float64 -> float32 rounded to odd, so that a second rounding to a narrower format is exact."""
    y = x.astype(F32)
    b = y.view(U32)
    b = b - (np.abs(y.astype(F64)) > np.abs(x)).astype(U32)
    inexact = (y.astype(F64) != x) & ~np.isnan(x)
    return (b | inexact.astype(U32)).view(F32)


def round32(x, mode="rn"):
    """float64 -> float32 in a given rounding mode."""
    y = x.astype(F32)
    if mode in ("rn", "rna"):
        return y
    w = y.astype(F64)
    if mode == "rz":
        b = y.view(U32) - (np.abs(w) > np.abs(x)).astype(U32)
        return b.view(F32)
    target = F32(-np.inf if mode == "rm" else np.inf)
    wrong = (w > x) if mode == "rm" else (w < x)
    return np.where(wrong, np.nextafter(y, target), y)


def round16(x, mode="rn"):
    """float32/float64 -> float16."""
    y = x.astype(F16)
    if mode in ("rn", "rna"):
        return y
    w = y.astype(F64)
    if mode == "rz":
        wrong, target = np.abs(w) > np.abs(x), np.zeros_like(y)
    elif mode == "rm":
        wrong, target = w > x, F16(-np.inf)
    else:
        wrong, target = w < x, F16(np.inf)
    return np.where(wrong, np.nextafter(y, target), y)


def to_tf32(x):
    """Round to nearest, ties away (cvt.rna.tf32.f32)."""
    b = x.view(U32)
    return np.where(np.isfinite(x), (b + U32(0x1000)) & U32(0xFFFFE000), b).view(F32)


def flush(x):
    return np.where(np.abs(x) < TINY32, np.copysign(F32(0), x), x) if x.dtype == F32 else x


def sum_odd(a, b):
    """float64 sum rounded to odd: no information for a later rounding is lost."""
    s = a + b
    t = s - a
    err = (a - (s - t)) + (b - t)
    bits = s.view(U64)
    fix = (err != 0) & ((bits & U64(1)) == 0) & np.isfinite(s)
    return np.where(fix, np.where((err > 0) == (s > 0), bits + U64(1), bits - U64(1)), bits).view(F64)


def fma32(a, b, c, mode="rn"):
    """float32 fma through float64, with the double-rounding cases repaired."""
    p = a.astype(F64) * b.astype(F64)                 # exact
    c = c.astype(F64)
    if mode != "rn":
        return round32(sum_odd(p, c), mode)
    s = p + c
    bits = s.view(U64)
    tie = (bits & U64(0x1FFFFFFF)) == U64(0x10000000)
    if tie.any():                                     # halfway in float32: was s itself rounded?
        t = s - p
        err = (p - (s - t)) + (c - t)
        up = (err > 0) == (s > 0)
        fix = tie & (err != 0) & np.isfinite(s)
        s = np.where(fix, np.where(up, bits + U64(1), bits - U64(1)).view(F64), s)
    return s.astype(F32)


def fma64(a, b, c):
    """float64 fma by error-free transformations (Dekker/Knuth)."""
    p = a * b
    k = F64(134217729.0)
    ah = k * a - (k * a - a)
    bh = k * b - (k * b - b)
    e = ((ah * bh - p) + ah * (b - bh) + (a - ah) * bh) + (a - ah) * (b - bh)
    s = p + c
    t = s - p
    r = s + (((p - (s - t)) + (c - t)) + e)
    return np.where(np.isfinite(r), r, s)


def minifloat_decode(exp, man, fn):
    """256-entry table of an 8-bit float; fn: e4m3fn (no infinities) else IEEE-like e5m2."""
    out = np.empty(256)
    bias = (1 << exp - 1) - 1
    for v in range(256):
        s, e, m = v >> 7, v >> man & (1 << exp) - 1, v & (1 << man) - 1
        x = m * 2.0 ** (1 - bias - man) if e == 0 else (1 + m / (1 << man)) * 2.0 ** (e - bias)
        if fn and e == (1 << exp) - 1 and m == (1 << man) - 1:
            x = np.nan
        elif not fn and e == (1 << exp) - 1:
            x = np.nan if m else np.inf
        out[v] = -x if s else x
    return out


FP8 = {"e4m3": minifloat_decode(4, 3, True), "e5m2": minifloat_decode(5, 2, False)}


def to_fp8(x, fmt):
    """Round to nearest even with saturation to the largest finite value."""
    table = FP8[fmt][:128]
    n = 0x7E if fmt == "e4m3" else 0x7B                # code of the largest finite value
    a = np.minimum(np.abs(x.astype(F64)), table[n])
    lo = np.clip(np.searchsorted(table[:n + 1], a, "right") - 1, 0, n)
    hi = np.minimum(lo + 1, n)
    dl, dh = a - table[lo], table[hi] - a
    r = np.where((dh < dl) | ((dh == dl) & (lo & 1 == 1)), hi, lo)
    r = np.where(np.isnan(x), 0x7F, r)
    return (r | (np.signbit(x).astype(int) << 7)).astype(U8)


def float_to_int(x, dt, mode):
    """Saturating float -> integer (NaN gives 0)."""
    x = {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}[mode](x.astype(F64))
    info = np.iinfo(dt)
    big = x >= float(info.max)
    small = x <= float(info.min)
    r = np.where(big | small | np.isnan(x), 0.0, x).astype(dt)
    return np.where(big, dt(info.max), np.where(small, dt(info.min), r))


def mulhi(a, b):
    """High half of the product of two equally typed integer arrays."""
    dt = a.dtype
    n = dt.itemsize * 8
    if n < 64:
        w = np.dtype(f"{dt.kind}{n // 4}").type
        return (a.astype(w) * b.astype(w) >> w(n)).astype(dt)
    ua, ub = a.view(U64), b.view(U64)
    m, k = U64(0xFFFFFFFF), U64(32)
    al, ah, bl, bh = ua & m, ua >> k, ub & m, ub >> k
    t = al * bl
    u = ah * bl + (t >> k)
    v = al * bh + (u & m)
    hi = ah * bh + (u >> k) + (v >> k)
    if dt.kind == "i":
        hi = hi - np.where(a < 0, ub, U64(0)) - np.where(b < 0, ua, U64(0))
    return hi.view(dt)


def int_div(a, b):
    """Quotient and remainder truncating towards zero; x/0 is all ones as on the hardware."""
    zero = b == 0
    b1 = np.where(zero, b.dtype.type(1), b)
    q = a // b1
    if a.dtype.kind == "i":
        q = q + ((a - q * b1 != 0) & ((a < 0) != (b1 < 0))).astype(a.dtype)
    r = a - q * b1
    return np.where(zero, np.array(-1).astype(a.dtype), q), np.where(zero, a, r)
