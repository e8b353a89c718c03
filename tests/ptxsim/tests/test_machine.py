"""Memory, control flow, warp-level and tensor-core instructions, and the checks."""
import numpy as np
import pytest
from util import HEADER, kernel, load_params, ptx_map

from ptxsim import Device, DeviceAssert, MemoryFault, PtxError, RaceError, UnsupportedInstruction

RNG = np.random.default_rng(2)
TID = np.arange(128, dtype=np.uint32)


def run(body, args, grid=1, block=32, module="", shared_bytes=0, dev=None, **opts):
    n = len(args)
    text = kernel(load_params(n) + body, ("u64",) * n, module=module)
    return dev.load(text).launch(None, grid, block, args, shared_bytes, **opts)


# ---- memory ---------------------------------------------------------------------------------
def test_sub_word_and_vector_loads():
    dev = Device()
    a = dev.array(RNG.integers(0, 256, 64).astype("u1"))
    o = dev.empty(32, np.uint32)
    run("""mov.u32 %r1, %tid.x; mad.wide.u32 %d1, %r1, 4, %d61; shr.u32 %r2, %r1, 0;
        setp.ne.u32 %p1, %r1, 0; @%p1 bra END;
        ld.global.u8 %r3, [%d60+5]; st.global.u32 [%d61], %r3;
        ld.global.s8 %r3, [%d60+5]; st.global.u32 [%d61+4], %r3;
        ld.global.s16 %r3, [%d60+6]; st.global.u32 [%d61+8], %r3;
        ld.volatile.global.v4.u8 {%r3, %r4, %r5, %r6}, [%d60+8]; st.global.v4.u32 [%d61+16], {%r3, %r4, %r5, %r6};
        ld.global.nc.L1::no_allocate.L2::128B.v2.b64 {%d3, %d4}, [%d60+16]; st.global.v2.b64 [%d61+32], {%d3, %d4};
        ld.global.v8.b32 {%r3, %r4, %r5, %r6, %r7, %r8, %r9, _}, [%d60+32]; st.global.b32 [%d61+48], %r9;
        ld.global.b16 %h1, [%d60+2]; cvt.u32.u16 %r3, %h1; st.global.b32 [%d61+52], %r3;
        mov.u32 %r3, 0x1234567; st.global.u8 [%d61+56], %r3; st.global.u16 [%d61+58], %r3;
        END:""", [a, o], dev=dev)
    x, r = a.numpy(), o.bits().view("u1")
    w = r.view("u4")
    assert w[0] == x[5] and w[1].view("i4") == x[5].view("i1") and w[2].view("i4") == x[6:8].view("i2")[0]
    assert (w[4:8] == x[8:12]).all() and (r[32:48] == x[16:32]).all() and (r[48:52] == x[56:60]).all()
    assert w[13] == x[2:4].view("u2")[0] and r[56] == 0x67 and r[58:60].view("u2")[0] == 0x4567
    assert list(o.initialised()[:16]) == [True] * 3 + [False] + [True] * 10 + [False] * 2


def test_shared_local_const_generic():
    dev = Device()
    o = dev.empty((64, 4), np.uint32)
    run("""mov.u32 %r1, %tid.x; shl.b32 %r2, %r1, 2; mov.u32 %r3, buf; add.u32 %r4, %r3, %r2;
        st.shared.u32 [%r4], %r1; bar.sync 0; sub.u32 %r5, 252, %r2; add.u32 %r5, %r3, %r5; ld.shared.u32 %r6, [%r5];
        .local .align 4 .b8 loc[16]; mov.u64 %d1, loc; st.local.u32 [%d1+4], %r2; cvta.local.u64 %d2, %d1;
        ld.u32 %r7, [%d2+4];
        cvt.u64.u32 %d3, %r4; cvta.shared.u64 %d3, %d3; ld.u32 %r8, [%d3]; cvta.to.shared.u64 %d4, %d3; ld.shared.u32 %r8, [%d4];
        and.b32 %r9, %r1, 3; mad.wide.u32 %d5, %r9, 4, 0; mov.u64 %d6, tab; add.s64 %d5, %d5, %d6; ld.const.u32 %r9, [%d5];
        mad.wide.u32 %d7, %r1, 16, %d60; cvta.to.global.u64 %d7, %d7; st.v4.u32 [%d7], {%r6, %r7, %r8, %r9};""",
        [o], block=64, dev=dev,
        module=".shared .align 4 .b8 buf[256]; .const .align 4 .u32 tab[4] = {10, 20, 0x1e, 40};")
    t = np.arange(64)
    assert (o.numpy() == np.stack([63 - t, 4 * t, t, 10 + 10 * (t % 4)], 1)).all()


def test_generic_pointer_mixing_windows():
    dev = Device()
    g, o = dev.array(TID[:32] + 100), dev.empty(32, np.uint32)
    run(""".shared .align 4 .b8 s[128]; mov.u32 %r1, %tid.x; shl.b32 %r2, %r1, 2; mov.u32 %r3, s; add.u32 %r3, %r3, %r2;
        st.shared.u32 [%r3], %r1; cvt.u64.u32 %d1, %r3; cvta.shared.u64 %d1, %d1; mad.wide.u32 %d2, %r1, 4, %d60;
        and.b32 %r4, %r1, 1; setp.eq.u32 %p1, %r4, 1; selp.b64 %d3, %d1, %d2, %p1; ld.u32 %r5, [%d3];
        add.u32 %r5, %r5, 1000; st.u32 [%d3], %r5; atom.add.u32 %r6, [%d3], 1; ld.u32 %r5, [%d3];
        mad.wide.u32 %d4, %r1, 4, %d61; st.global.u32 [%d4], %r5;""", [g, o], dev=dev)
    t = np.arange(32)
    assert (o.numpy() == np.where(t % 2, t, t + 100) + 1001).all()


def test_parameters():
    dev = Device()
    o = dev.empty(8, np.uint64)
    text = HEADER + """.visible .entry k(.param .u64 o, .param .u8 a, .param .s32 b, .param .f32 c, .param .f64 d,
        .param .align 8 .b8 e[16], .param .b32 f, .param .u64 .ptr .global .align 1 g)
        {.reg .b64 %d<9>; .reg .b32 %r<9>; .reg .f32 %f<2>; .reg .f64 %g<2>;
        ld.param.u64 %d1, [o]; ld.param.u8 %r1, [a]; ld.param.s32 %d2, [b]; ld.param.f32 %f1, [c]; ld.param.f64 %g1, [d];
        ld.param.v2.u32 {%r2, %r3}, [e+8]; ld.param.b32 %r4, [f]; ld.param.u64 %d3, [g];
        st.global.u32 [%d1], %r1; st.global.u64 [%d1+8], %d2; st.global.f32 [%d1+16], %f1; st.global.f64 [%d1+24], %g1;
        st.global.v2.u32 [%d1+32], {%r2, %r3}; st.global.b32 [%d1+40], %r4; st.global.u64 [%d1+48], %d3; ret;}"""
    e = np.arange(4, dtype=np.uint32)
    dev.load(text).launch("k", args=[o, 7, -3, 1.5, 2.5, e.tobytes(), 0.25])
    b = o.bits()
    assert b.view("u4")[0] == 7
    assert b[1].astype("i8") == -3 and b.view("f4")[4] == 1.5 and b.view("f8")[3] == 2.5
    assert list(b.view("u4")[8:10]) == [2, 3] and b.view("f4")[10] == 0.25 and b[6] == 0
    with pytest.raises(PtxError, match="parameters"):
        dev.load(text).launch("k", args=[o])


def test_indexed_parameter():
    dev = Device()
    o = dev.empty(32, np.uint32)
    text = HEADER + """.visible .entry k(.param .u64 o, .param .align 4 .b8 e[16]) {.reg .b64 %d<9>; .reg .b32 %r<9>;
        ld.param.u64 %d1, [o]; mov.u32 %r1, %tid.x; and.b32 %r2, %r1, 3; mov.b64 %d2, e; mad.wide.u32 %d3, %r2, 4, %d2;
        ld.param.u32 %r3, [%d3]; cvta.param.u64 %d4, %d3; ld.u32 %r4, [%d4]; add.u32 %r3, %r3, %r4;
        mad.wide.u32 %d5, %r1, 4, %d1; st.global.u32 [%d5], %r3; ret;}"""
    dev.load(text).launch("k", 1, 32, [o, np.array([1, 20, 300, 4000], np.uint32)])
    assert (o.numpy() == np.array([2, 40, 600, 8000])[np.arange(32) % 4]).all()


def test_memory_grows():
    dev = Device(capacity=1 << 17)
    a = [dev.array(np.full(5000, i, np.float32)) for i in range(20)]
    o = dev.empty(32, np.float32)
    run("ld.global.f32 %f1, [%d60]; mov.u32 %r1, %tid.x; mad.wide.u32 %d1, %r1, 4, %d61; st.global.f32 [%d1], %f1;", [a[7], o], dev=dev)
    assert (o.numpy() == 7).all() and all((x.numpy() == i).all() for i, x in enumerate(a))


def test_function_call_and_inlining():
    fn = """.func (.param .b32 r) sq(.param .b32 x, .param .b32 n) {.reg .b32 %r<9>; .reg .pred %p<2>;
        ld.param.u32 %r1, [x]; ld.param.u32 %r2, [n]; setp.gt.u32 %p1, %r2, 2; @%p1 bra BIG; mul.lo.u32 %r3, %r1, %r1;
        st.param.b32 [r], %r3; ret; BIG: st.param.b32 [r], %r2; ret;}"""
    dev = Device()
    o = dev.empty(32, np.uint32)
    run("""mov.u32 %r1, %tid.x; { .param .b32 a; .param .b32 b; .param .b32 c; st.param.b32 [a+0], %r1; and.b32 %r2, %r1, 3;
        st.param.b32 [b], %r2; call.uni (c), sq, (a, b); ld.param.b32 %r3, [c+0]; }
        mad.wide.u32 %d1, %r1, 4, %d60; st.global.u32 [%d1], %r3;""", [o], dev=dev, module=fn)
    t = np.arange(32)
    assert (o.numpy() == np.where(t % 4 > 2, t % 4, t * t)).all()


# ---- control flow ---------------------------------------------------------------------------
def test_divergent_loop_and_early_exit():
    n = 128
    a = RNG.integers(0, 50, n).astype("u4")
    got = ptx_map("mov.u32 %r1, 0; mov.u32 %o0, 0; L: setp.ge.u32 %p1, %r1, %i0; @%p1 bra E; and.b32 %r2, %r1, 1;"
                  "setp.eq.u32 %p2, %r2, 0; @%p2 bra EVEN; add.u32 %o0, %o0, 100; bra.uni N; EVEN: add.u32 %o0, %o0, 1;"
                  "N: add.u32 %r1, %r1, 1; bra L; E:", [a], ["u4"])
    assert (got == (a + 1) // 2 + a // 2 * 100).all()
    dev = Device()
    o = dev.zeros(256, np.uint32)
    run("""mov.u32 %r1, %tid.x; mov.u32 %r2, %ctaid.x; mad.lo.u32 %r3, %r2, 128, %r1; setp.gt.u32 %p1, %r3, 200; @%p1 ret;
        bar.sync 0; mad.wide.u32 %d1, %r3, 4, %d60; st.global.u32 [%d1], %r3;""", [o], 2, 128, dev=dev)
    t = np.arange(256)
    assert (o.numpy() == np.where(t > 200, 0, t)).all()


def test_indexed_branch():
    got = ptx_map("and.b32 %r1, %i0, 3; T: .branchtargets A, B, C, D; brx.idx %r1, T; A: mov.u32 %o0, 10; bra E;"
                  "B: mov.u32 %o0, 20; bra E; C: mov.u32 %o0, 30; bra E; D: mov.u32 %o0, 40; E:", [TID], ["u4"])
    assert (got == 10 + 10 * (TID & 3)).all()


def test_partial_warp_block():
    got = ptx_map("mov.u32 %o0, %ntid.x; activemask.b32 %o1; mov.u32 %o2, %laneid; mov.u32 %o3, %warpid;"
                  "mov.u32 %o4, %nctaid.x;", [np.arange(90, dtype="u4")], ["u4"] * 5, block=45)
    t = np.arange(90) % 45
    assert (got[0] == 45).all() and (got[2] == t % 32).all() and (got[3] == t // 32).all() and (got[4] == 2).all()
    assert (got[1] == np.where(t < 32, 0xFFFFFFFF, 0x1FFF)).all()


def test_special_registers_3d():
    dev = Device()
    o = dev.empty((12, 24, 2), np.uint32)
    run("""mov.u32 %r1, %tid.x; mov.u32 %r2, %tid.y; mov.u32 %r3, %tid.z; mov.u32 %r4, %ntid.x; mov.u32 %r5, %ntid.y;
        mad.lo.u32 %r6, %r3, %r5, %r2; mad.lo.u32 %r6, %r6, %r4, %r1;
        mov.u32 %r7, %ctaid.x; mov.u32 %r8, %ctaid.y; mov.u32 %r9, %ctaid.z; mov.u32 %r10, %nctaid.x; mov.u32 %r11, %nctaid.y;
        mad.lo.u32 %r12, %r9, %r11, %r8; mad.lo.u32 %r12, %r12, %r10, %r7; mad.lo.u32 %r13, %r12, 24, %r6;
        mad.wide.u32 %d1, %r13, 8, %d60; st.global.v2.u32 [%d1], {%r12, %r6};""", [o], (2, 3, 2), (4, 3, 2), dev=dev)
    assert (o.numpy() == np.stack(np.meshgrid(np.arange(12), np.arange(24), indexing="ij"), -1)).all()


def test_barrier_reduction_and_named_barriers():
    got = ptx_map("setp.lt.u32 %p1, %i0, 77; barrier.cta.red.popc.u32 %o0, 0, %p1; bar.red.and.pred %p2, 0, %p1;"
                  "bar.red.or.pred %p3, 0, !%p1; selp.u32 %o1, 1, 0, %p2; selp.u32 %o2, 1, 0, %p3;", [TID], ["u4"] * 3)
    assert (got[0] == 77).all() and (got[1] == 0).all() and (got[2] == 1).all()
    dev = Device()                      # warp 0 produces, warp 1 consumes; warps 2, 3 stay away
    o = dev.empty(32, np.uint32)
    run(""".shared .align 4 .b8 s[128]; mov.u32 %r1, %tid.x; shr.u32 %r2, %r1, 5; and.b32 %r3, %r1, 31; shl.b32 %r4, %r3, 2;
        mov.u32 %r5, s; add.u32 %r5, %r5, %r4; setp.gt.u32 %p1, %r2, 1; @%p1 bra END; setp.eq.u32 %p2, %r2, 1; @%p2 bra C;
        st.shared.u32 [%r5], %r1; bar.arrive 3, 64; bra END;
        C: bar.sync 3, 64; ld.shared.u32 %r6, [%r5]; mad.wide.u32 %d1, %r3, 4, %d60; st.global.u32 [%d1], %r6;
        END: bar.sync 0;""", [o], 1, 128, dev=dev)
    assert (o.numpy() == np.arange(32)).all()


def test_spin_lock_between_ctas():
    dev = Device()
    lock, total = dev.zeros(1, np.uint32), dev.zeros(1, np.uint32)
    run("""mov.u32 %r1, %tid.x; setp.ne.u32 %p1, %r1, 0; @%p1 bra END;
        SPIN: atom.acquire.gpu.global.cas.b32 %r2, [%d60], 0, 1; setp.ne.u32 %p2, %r2, 0; @%p2 bra SPIN;
        ld.volatile.global.u32 %r3, [%d61]; add.u32 %r3, %r3, 1; st.volatile.global.u32 [%d61], %r3; membar.gl;
        atom.release.gpu.global.exch.b32 %r4, [%d60], 0; END: bar.sync 0;""", [lock, total], 20, 32, dev=dev)
    assert total.numpy()[0] == 20 and lock.numpy()[0] == 0


def test_endless_loop_and_deadlock():
    dev = Device()
    with pytest.raises(PtxError, match="endless"):
        run("L: bra L;", [], dev=dev, max_steps=5000)
    with pytest.raises(PtxError, match="deadlock"):
        run("""mov.u32 %r1, %tid.x; setp.lt.u32 %p1, %r1, 16; @%p1 bra A; bar.sync 1; A: bar.sync 2; """, [], dev=dev)


# ---- atomics --------------------------------------------------------------------------------
def atomics(instr, init, vals, dtype, n=96, red=False):
    dev = Device()
    tgt, v = dev.array(np.array(init, dtype)), dev.array(np.array(vals, dtype))
    w = np.dtype(dtype).itemsize
    old = dev.empty(n, dtype)
    reg = {2: "%h1", 4: "%r5", 8: "%d5"}[w]
    src = {2: "%h2", 4: "%r6", 8: "%d6"}[w]
    run(f"""mov.u32 %r1, %tid.x; rem.u32 %r2, %r1, {len(init)}; mad.wide.u32 %d1, %r2, {w}, %d60;
        mad.wide.u32 %d2, %r1, {w}, %d61; ld.global.b{8 * w} {src}, [%d2]; {instr.format(d=reg, a='[%d1]', b=src)}
        mad.wide.u32 %d3, %r1, {w}, %d62; """ + ("" if red else f"st.global.b{8 * w} [%d3], {reg};"), [tgt, v, old], 1, n, dev=dev)
    return tgt.numpy(), None if red else old.numpy()


@pytest.mark.parametrize("name,ty,dt,fn", [
    ("add", "u32", "u4", lambda a, b: (a + b) % 2**32), ("add", "u64", "u8", lambda a, b: (a + b) % 2**64),
    ("max", "s32", "i4", max), ("min", "u32", "u4", min), ("and", "b32", "u4", lambda a, b: a & b),
    ("or", "b32", "u4", lambda a, b: a | b), ("xor", "b64", "u8", lambda a, b: a ^ b), ("exch", "b32", "u4", lambda a, b: b),
    ("inc", "u32", "u4", lambda a, b: 0 if a >= b else a + 1), ("dec", "u32", "u4", lambda a, b: b if a == 0 or a > b else a - 1),
    ("add", "f32", "f4", lambda a, b: np.float32(a + b)), ("add", "f64", "f8", lambda a, b: a + b)])
def test_atomic_ops(name, ty, dt, fn):
    n, k = 96, 3
    vals = RNG.integers(0, 1000, n) if dt[0] != "f" else RNG.standard_normal(n).astype(dt)
    init = [5, 6, 7]
    got, old = atomics("atom.global.relaxed.gpu." + name + "." + ty + " {d}, {a}, {b};", init, vals, dt)
    cur, want_old = [np.dtype(dt).type(v) for v in init], []
    cur = cur if dt[0] == "f" else [int(v) for v in cur]
    for i in range(n):
        want_old.append(cur[i % k])
        cur[i % k] = fn(cur[i % k], np.dtype(dt).type(vals[i]) if dt[0] == "f" else int(vals[i]))
    assert list(got) == cur and list(old) == want_old
    red, _ = atomics("red.global." + name + "." + ty + " {a}, {b};", init, vals, dt, red=True) if name != "exch" else (got, 0)
    assert (red == got).all()


def test_atomic_cas_and_vector():
    got, old = atomics("atom.global.cas.b32 {d}, {a}, 5, {b};", [5], np.arange(10, 106), "u4")
    assert got[0] == 10 and list(old) == [5] + [10] * 95
    dev = Device()
    t = dev.zeros(4, np.float32)
    run("mov.f32 %f1, 0f3F800000; mov.f32 %f2, 0f40000000; red.global.add.v2.f32 [%d60+8], {%f1, %f2};"
        "mov.b32 %r1, 0x40003C00; red.global.add.noftz.f16x2 [%d60], %r1;", [t], 1, 64, dev=dev)
    assert list(t.numpy()[2:]) == [64, 128] and list(t.bits().view("f2")[:2]) == [64, 128]


def test_shared_atomics():
    dev = Device()
    o = dev.empty(4, np.uint32)
    run(""".shared .align 4 .b8 s[16]; mov.u32 %r1, %tid.x; mov.u32 %r2, s; and.b32 %r3, %r1, 3; shl.b32 %r4, %r3, 2;
        add.u32 %r5, %r2, %r4; setp.lt.u32 %p1, %r1, 4; @%p1 st.shared.u32 [%r5], 0; bar.sync 0;
        atom.shared.add.u32 %r6, [%r5], %r1; red.shared.max.u32 [%r5], 3; bar.sync 0; ld.shared.u32 %r7, [%r5];
        mad.wide.u32 %d1, %r3, 4, %d60; @%p1 st.global.u32 [%d1], %r7;""", [o], 1, 128, dev=dev)
    assert list(o.numpy()) == [sum(range(i, 128, 4)) for i in range(4)]


# ---- warp-level instructions ----------------------------------------------------------------
def shfl_ref(mode, v, b, c):
    out, ok = [], []
    for lane in range(32):
        seg, cl, bl = c >> 8 & 31, c & 31, b[lane] & 31
        hi, lo = (lane & seg) | (cl & ~seg), lane & seg
        j = {"up": lane - bl, "down": lane + bl, "bfly": lane ^ bl, "idx": lo | (bl & ~seg)}[mode]
        p = j >= hi if mode == "up" else j <= hi
        out.append(v[j if p else lane])
        ok.append(p)
    return out, ok


@pytest.mark.parametrize("mode", ["up", "down", "bfly", "idx"])
@pytest.mark.parametrize("c", [31, 0, 0x181F, 0x1C1F, 0x1800, 7])
def test_shfl(mode, c):
    v, b = RNG.integers(0, 1000, 64).astype("u4"), RNG.integers(0, 32, 64).astype("u4")
    o = ptx_map(f"shfl.sync.{mode}.b32 %o0|%o1, %i0, %i1, {c}, -1; shfl.sync.{mode}.b32 %o2|%p1, %i0, 5, {c}, 0xffffffff;",
                [v, b], ["u4", bool, "u4"])
    for w in (0, 32):
        want, ok = shfl_ref(mode, v[w:w + 32], b[w:w + 32].astype(int), c)
        assert list(o[0][w:w + 32]) == want and list(o[1][w:w + 32]) == ok
        assert list(o[2][w:w + 32]) == shfl_ref(mode, v[w:w + 32], [5] * 32, c)[0]


def test_shuffle_waits_for_diverged_lanes():
    """The two halves of the warp meet at the shuffle although one takes a detour placed later."""
    got = ptx_map("setp.lt.u32 %p1, %i0, 16; mov.u32 %r1, %i0; @%p1 bra SLOW; MEET: shfl.sync.bfly.b32 %o0, %r1, 16, 31, -1;"
                  "bra END; SLOW: add.u32 %r1, %r1, 100; bra MEET; END:", [TID[:32]], ["u4"])
    t = np.arange(32)
    assert (got == np.where(t < 16, t + 16, t - 16 + 100)).all()


def test_shuffle_from_inactive_lane():
    with pytest.raises(PtxError, match="inactive"):
        ptx_map("mov.u32 %o0, 0; setp.lt.u32 %p1, %i0, 16; @!%p1 bra E; shfl.sync.bfly.b32 %o0, %i0, 16, 31, 0xffff; E:",
                [TID[:32]], ["u4"])


def test_vote_match_redux_elect():
    a = RNG.integers(0, 4, 64).astype("u4")
    o = ptx_map("setp.eq.u32 %p1, %i0, 1; vote.sync.ballot.b32 %o0, %p1, -1; vote.sync.any.pred %o1, %p1, -1;"
                "vote.sync.all.pred %o2, !%p1, -1; match.any.sync.b32 %o3, %i0, -1; redux.sync.add.s32 %o4, %i0, -1;"
                "redux.sync.max.u32 %o5, %i0, -1; elect.sync %r1|%o6, -1; match.all.sync.b32 %r2|%o7, %i0, -1;"
                "redux.sync.xor.b32 %o8, %i0, 0x00ff; @%p1 activemask.b32 %o9;",
                [a], ["u4", bool, bool, "u4", "u4", "u4", bool, bool, "u4", "u4"])
    for w in (slice(0, 32), slice(32, 64)):
        x = a[w]
        ballot = sum(1 << i for i in range(32) if x[i] == 1)
        assert (o[0][w] == ballot).all() and (o[1][w] == (x == 1).any()).all() and (o[2][w] == (x != 1).all()).all()
        assert [int(v) for v in o[3][w]] == [sum(1 << i for i in range(32) if x[i] == y) for y in x]
        assert (o[4][w] == x.sum()).all() and (o[5][w] == x.max()).all() and not o[7][w].any()
        assert list(o[6][w]) == [True] + [False] * 31
        assert (o[8][w][:8] == np.bitwise_xor.reduce(x[:8])).all()
        assert (o[9][w][x == 1] == ballot).all()
    f = RNG.standard_normal(32).astype("f4")
    f[3] = np.nan
    r = ptx_map("redux.sync.min.f32 %o0, %i0, -1; redux.sync.max.abs.NaN.f32 %o1, %i0, -1;", [f], ["f4", "f4"])
    assert (r[0] == np.nanmin(f)).all() and np.isnan(r[1]).all()


# ---- tensor core ----------------------------------------------------------------------------
def split(x, dt):
    """float64 matrix -> (bits, value) in a 16-bit type or tf32."""
    x = x.astype(np.float32)
    if dt == "f16":
        return x.astype("f2").view("u2"), x.astype("f2").astype("f8")
    if dt == "bf16":
        b = (x.view("u4") >> 16).astype("u2")
        return b, (b.astype("u4") << 16).view("f4").astype("f8")
    return x.view("u4"), (x.view("u4") & 0xFFFFE000).view("f4").astype("f8")


@pytest.mark.parametrize("k,dt", [(16, "f16"), (16, "bf16"), (8, "f16"), (8, "bf16"), (8, "tf32"), (4, "tf32")])
def test_mma(k, dt):
    (ab, a), (bb, b) = split(RNG.standard_normal((16, k)), dt), split(RNG.standard_normal((k, 8)), dt)
    c = RNG.standard_normal((16, 8)).astype("f4")
    g, t = np.arange(32) >> 2, np.arange(32) & 3
    na, nb, per = 16 * k // 32, 8 * k // 32, 2 if dt != "tf32" else 1

    # fragment index formulas of the PTX manual, written per element
    def a_at(i):
        r, j = divmod(i, per)
        row = g + (8 if r % 2 else 0)
        col = t * per + j + (4 * per if r >= 2 else 0)
        return ab[row, col]
    fa = np.stack([a_at(i) for i in range(na)], 1)
    fb = np.stack([bb[t * per + i % per + 4 * per * (i // per), g] for i in range(nb)], 1)
    ins = [np.ascontiguousarray(x) for f in (fa, fb) for x in f.reshape(32, -1).view("u4").T]
    ins += [np.ascontiguousarray(c[g + 8 * (i // 2), 2 * t + i % 2]) for i in range(4)]
    ra, rb = na // per, nb // per

    def regs(lo, n):
        return "{" + ", ".join(f"%i{i}" for i in range(lo, lo + n)) + "}"
    o = ptx_map(f"mma.sync.aligned.m16n8k{k}.row.col.f32.{dt}.{dt}.f32 {{%o0, %o1, %o2, %o3}}, {regs(0, ra)}, "
                f"{regs(ra, rb)}, {regs(ra + rb, 4)};", ins, ["f4"] * 4)
    want = a @ b + c
    for i in range(4):
        assert np.allclose(o[i], want[g + 8 * (i // 2), 2 * t + i % 2], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("trans", ["", ".trans"])
def test_ldmatrix_stmatrix(trans):
    dev = Device()
    src, dst, frag = dev.array(RNG.integers(0, 65536, (32, 8)).astype("u2")), dev.empty((32, 8), np.uint16), dev.empty((32, 4), np.uint32)
    run(f""".shared .align 16 .b8 s[1024]; mov.u32 %r1, %tid.x; shl.b32 %r2, %r1, 4; mov.u32 %r3, s; add.u32 %r4, %r3, %r2;
        mad.wide.u32 %d1, %r1, 16, %d60; ld.global.v4.b32 {{%r5, %r6, %r7, %r8}}, [%d1]; st.shared.v4.b32 [%r4], {{%r5, %r6, %r7, %r8}};
        bar.sync 0; ldmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 {{%r9, %r10, %r11, %r12}}, [%r4];
        mad.wide.u32 %d2, %r1, 16, %d62; st.global.v4.b32 [%d2], {{%r9, %r10, %r11, %r12}};
        stmatrix.sync.aligned.m8n8.x4{trans}.shared::cta.b16 [%r4+512], {{%r9, %r10, %r11, %r12}}; bar.sync 0;
        ld.shared.v4.b32 {{%r5, %r6, %r7, %r8}}, [%r4+512]; mad.wide.u32 %d2, %r1, 16, %d61; st.global.v4.b32 [%d2], {{%r5, %r6, %r7, %r8}};""",
        [src, dst, frag], dev=dev)
    assert (dst.numpy() == src.numpy()).all()
    m = src.numpy().reshape(4, 8, 8)
    f = frag.numpy().view("u2").reshape(32, 4, 2)
    for lane in range(32):
        for i in range(4):
            for j in range(2):
                r, c = lane >> 2, 2 * (lane & 3) + j
                assert f[lane, i, j] == (m[i, c, r] if trans else m[i, r, c])


def test_ldmatrix_at_a_symbol():
    """Every lane names the same row of shared memory, by its symbol and not by a register."""
    dev = Device()
    src, frag = dev.array(RNG.integers(0, 65536, 8).astype("u2")), dev.empty(32, np.uint32)
    run(""".shared .align 16 .b8 s[16]; mov.u32 %r1, %tid.x; setp.eq.u32 %p1, %r1, 0; ld.global.v4.b32 {%r5, %r6, %r7, %r8}, [%d60];
        @%p1 st.shared.v4.b32 [s], {%r5, %r6, %r7, %r8}; bar.sync 0; ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r9}, [s];
        mad.wide.u32 %d2, %r1, 4, %d61; st.global.b32 [%d2], %r9;""", [src, frag], dev=dev)
    assert (frag.numpy().reshape(8, 4) == src.numpy().view("u4")).all()


CP = """.shared .align 16 .b8 s[1024]; mov.u32 %r1, %tid.x; shl.b32 %r2, %r1, 4; mov.u32 %r3, s; add.u32 %r4, %r3, %r2;
    mad.wide.u32 %d1, %r1, 16, %d60; setp.lt.u32 %p1, %r1, 20; selp.b32 %r9, 16, 0, %p1; setp.eq.u32 %p1, %r1, 20;
    selp.b32 %r9, 4, %r9, %p1; cp.async.cg.shared.global [%r4], [%d1], 0x10, %r9; cp.async.commit_group; {wait}
    {bar} xor.b32 %r5, %r4, {flip}; ld.shared.v4.b32 {{%r5, %r6, %r7, %r8}}, [%r5]; mad.wide.u32 %d2, %r1, 16, %d61;
    st.global.v4.b32 [%d2], {{%r5, %r6, %r7, %r8}};"""


def test_cp_async():
    x = RNG.integers(1, 2**32, (64, 4)).astype("u4")
    want = x.copy()
    want[20, 1:], want[21:] = 0, 0
    for wait, bar, flip, err in (("cp.async.wait_group 0;", "bar.sync 0;", 512, None), ("cp.async.wait_all;", "", 0, None),
                                 ("", "bar.sync 0;", 512, "in flight"), ("cp.async.wait_group 1;", "bar.sync 0;", 0, "in flight"),
                                 ("cp.async.wait_group 0;", "", 512, "race")):
        dev = Device()
        a, o = dev.array(x), dev.empty((64, 4), np.uint32)
        if err:
            with pytest.raises(RaceError, match=err):
                run(CP.format(wait=wait, bar=bar, flip=flip), [a, o], 1, 64, dev=dev)
        else:
            run(CP.format(wait=wait, bar=bar, flip=flip), [a, o], 1, 64, dev=dev)
            assert (o.numpy() == want[np.arange(64) ^ (flip // 16)]).all()


# ---- checks ---------------------------------------------------------------------------------
STORE = "mov.u32 %r1, %tid.x; mad.wide.u32 %d1, %r1, 4, %d60;\n.loc 1 42 0\n st.global.u32 [%d1+{off}], %r1;"


@pytest.mark.parametrize("off,match", [(4, "0 bytes past the end of allocation 'out'"), (-4, "4 bytes before allocation 'out'"),
                                       (2, "misaligned"), (1 << 40, "out of bounds"), (400, "400|272")])
def test_out_of_bounds_store(off, match):
    dev = Device()
    o = dev.empty(32, np.uint32, name="out")
    with pytest.raises(MemoryFault, match=match) as e:
        run(STORE.format(off=off), [o], dev=dev)
    assert "kernel k" in str(e.value) and ":42" in str(e.value) and "thread (" in str(e.value) and "st.global.u32" in str(e.value)


def test_fault_names_the_thread():
    dev = Device()
    o = dev.empty(150, np.uint32, name="out")
    with pytest.raises(MemoryFault, match=r"CTA \(1,0,0\) thread \(22,0,0\)"):
        run("mov.u32 %r1, %tid.x; mov.u32 %r2, %ctaid.x; mad.lo.u32 %r1, %r2, 128, %r1; mad.wide.u32 %d1, %r1, 4, %d60;"
            "st.global.u32 [%d1], %r1;", [o], 2, 128, dev=dev)


def test_null_freed_and_uninitialised():
    dev = Device()
    o = dev.empty(32, np.uint32, name="buf")
    load = "mov.u32 %r1, %tid.x; mad.wide.u32 %d1, %r1, 4, %d60; ld.global.u32 %r2, [%d1];"
    with pytest.raises(MemoryFault, match="uninitialised.*\n(.*\n)*.*'buf'"):
        run(load, [o], dev=dev)
    run(load, [o], dev=dev, check_init=False)
    with pytest.raises(MemoryFault, match="null"):
        run(load, [None], dev=dev)
    o.free()
    with pytest.raises(MemoryFault, match="freed"):
        run(load, [o], dev=dev)
    with pytest.raises(MemoryFault, match="atomic on uninitialised"):
        run("atom.global.add.u32 %r1, [%d60], 1;", [dev.empty(4, np.uint32)], dev=dev)


def test_misaligned_vector_and_shared_bounds():
    dev = Device()
    a = dev.array(np.zeros(64, np.uint32))
    with pytest.raises(MemoryFault, match="misaligned access of 16 bytes"):
        run("ld.global.v4.u32 {%r1, %r2, %r3, %r4}, [%d60+4];", [a], dev=dev)
    with pytest.raises(MemoryFault, match="shared memory access"):
        run(".shared .align 4 .b8 s[64]; mov.u32 %r1, %tid.x; shl.b32 %r1, %r1, 2; st.shared.u32 [%r1], 0;", [], dev=dev)
    with pytest.raises(MemoryFault, match="uninitialised shared"):
        run(".shared .align 4 .b8 s[64]; ld.shared.u32 %r1, [s];", [], dev=dev)
    with pytest.raises(MemoryFault, match="local memory access"):
        run(".local .align 4 .b8 s[64]; mov.u64 %d1, s; ld.local.u32 %r1, [%d1+64];", [], dev=dev)


SH = """.shared .align 4 .b8 s[512]; mov.u32 %r1, %tid.x; shl.b32 %r2, %r1, 2; mov.u32 %r3, s; add.u32 %r4, %r3, %r2;
    st.shared.u32 [%r4], %r1; {b1} xor.b32 %r5, %r2, {x}; add.u32 %r5, %r3, %r5; ld.shared.u32 %r6, [%r5]; {b2}
    st.shared.u32 [%r4], %r6;"""


def test_shared_races():
    dev = Device()
    run(SH.format(b1="bar.sync 0;", b2="bar.sync 0;", x=128), [], 3, 128, dev=dev)
    run(SH.format(b1="", b2="", x=4), [], 3, 128, dev=dev)                    # within a warp
    with pytest.raises(RaceError, match="read of data written"):
        run(SH.format(b1="", b2="bar.sync 0;", x=128), [], 3, 128, dev=dev)
    with pytest.raises(RaceError, match="overwrites data read"):
        run(SH.format(b1="bar.sync 0;", b2="", x=128), [], 3, 128, dev=dev)
    run(SH.format(b1="", b2="", x=128), [], 3, 128, dev=dev, racecheck_shared=False)
    with pytest.raises(RaceError, match="different values"):
        run(".shared .align 4 .b8 s[4]; mov.u32 %r1, %tid.x; st.shared.u32 [s], %r1;", [], 1, 64, dev=dev)
    run(".shared .align 4 .b8 s[4]; st.shared.u32 [s], 5;", [], 1, 64, dev=dev)     # same value: harmless


def test_global_races():
    dev = Device()
    o, c = dev.zeros(128, np.uint32), dev.zeros(1, np.uint32)
    run("mov.u32 %r1, %ctaid.x; st.global.u32 [%d60], %r1;", [o], 2, 32, dev=dev)   # not checked by default
    with pytest.raises(RaceError, match="another thread"):
        run("mov.u32 %r1, %ctaid.x; st.global.u32 [%d60], %r1;", [o], 2, 32, dev=dev, racecheck=True, batch_threads=32)
    with pytest.raises(RaceError, match="different values"):
        run("mov.u32 %r1, %ctaid.x; st.global.u32 [%d60], %r1;", [o], 2, 32, dev=dev, racecheck=True)
    run("st.global.u32 [%d60], 5;", [o], 2, 32, dev=dev, racecheck=True)
    ex = """mov.u32 %r1, %tid.x; mad.wide.u32 %d1, %r1, 4, %d60; st.global.u32 [%d1], %r1; BAR xor.b32 %r2, %r1, 64;
        mad.wide.u32 %d2, %r2, 4, %d60; ld.global.u32 %r3, [%d2];"""
    run(ex.replace("BAR", "bar.sync 0;"), [o], 1, 128, dev=dev, racecheck=True)
    with pytest.raises(RaceError, match="reads data written"):
        run(ex.replace("BAR", ""), [o], 1, 128, dev=dev, racecheck=True)
    last = """mov.u32 %r1, %tid.x; mov.u32 %r2, %ctaid.x; setp.ne.u32 %p1, %r1, 0; @%p1 bra E; mad.wide.u32 %d1, %r2, 4, %d60;
        st.global.u32 [%d1], 7; membar.gl; atom.global.inc.u32 %r3, [%d61], 7; setp.ne.u32 %p2, %r3, 7; @%p2 bra E;
        ld{}.global.u32 %r4, [%d60]; E: """
    run(last.format(".volatile"), [o, c], 8, 32, dev=dev, racecheck=True)
    run(last.format(""), [o, c], 8, 32, dev=dev, racecheck=True, allow_post_atomic=True)
    with pytest.raises(RaceError, match="reads data written"):
        run(last.format(""), [o, c], 8, 32, dev=dev, racecheck=True)


def test_assert_trap_unsupported():
    dev = Device()
    with pytest.raises(DeviceAssert):
        run("mov.u32 %r1, %tid.x; setp.eq.u32 %p1, %r1, 3; @%p1 trap;", [], dev=dev)
    with pytest.raises(UnsupportedInstruction, match="wgmma.fence"):
        run("wgmma.fence.sync.aligned;", [], dev=dev)
    with pytest.raises(PtxError, match="matches among"):
        dev.load(kernel("")).launch("nope")
    with pytest.raises(PtxError, match="label"):
        run("bra NOWHERE;", [], dev=dev)


# ---- statistics -----------------------------------------------------------------------------
def test_traffic_counters():
    dev = Device()
    a, o = dev.array(np.zeros(4096, np.float32), name="a"), dev.empty(4096, np.float32, name="o")
    body = """mov.u32 %r1, %tid.x; mov.u32 %r2, %ctaid.x; mad.lo.u32 %r3, %r2, 128, %r1; mad.wide.u32 %d1, %r3, {s}, %d60;
        ld.global.f32 %f1, [%d1]; add.f32 %f1, %f1, %f1; mad.wide.u32 %d2, %r3, 4, %d61; st.global.f32 [%d2], %f1;"""
    st = run(body.format(s=4), [a, o], 8, 128, dev=dev)
    m = st.memory["a"]
    assert (m["ld_bytes"], m["ld_sectors"], m["ld_requests"], m["ld_unique"]) == (4096, 128, 32, 4096)
    assert st.memory["o"]["st_bytes"] == 4096 and st.efficiency("a") == 1 and st.instructions["ld_global"] == 32
    assert st.instructions["fp32"] == 32 and st.instructions["st_global"] == 32
    st = run(body.format(s=16), [a, o], 8, 128, dev=dev)
    assert st.memory["a"]["ld_sectors"] == 512 and st.efficiency("a") == 0.25
    st = run(body.format(s=0), [a, o], 8, 128, dev=dev)
    m = st.memory["a"]
    assert m["ld_sectors"] == 32 and m["ld_unique"] == 4 and m["ld_useful"] == 128 and "a: ld 4096 B" in str(st)


def test_bank_conflicts():
    dev = Device()
    body = """.shared .align 4 .b8 s[4096]; mov.u32 %r1, %tid.x; mul.lo.u32 %r2, %r1, {}; st.shared.u32 [%r2], %r1;"""
    for stride, waves in ((4, 1), (8, 2), (128, 32), (4 * 31, 1)):
        st = run(body.format(stride), [], 1, 32, dev=dev, bank_conflicts=True)
        assert (st.shared_wavefronts, st.shared_requests) == (waves, 1)


@pytest.mark.parametrize("order", ["forward", "reverse", "random"])
def test_only_the_given_ctas_run(order):
    dev = Device()
    o = dev.array(np.zeros(5, np.uint32))
    stats = run("""mov.u32 %r1, %ctaid.x; mov.u32 %r2, %nctaid.x; mad.wide.u32 %d1, %r1, 4, %d60;
        add.u32 %r3, %r1, %r2; st.global.u32 [%d1], %r3;""", [o], 5, 1, dev=dev, order=order, ctas=[1, 4])
    assert list(o.numpy()) == [0, 6, 0, 0, 9] and stats.ctas == 2


@pytest.mark.parametrize("order", ["forward", "reverse", "random"])
@pytest.mark.parametrize("batch", [32, 256, 1 << 16])
def test_batches_and_order(order, batch):
    dev = Device()
    o = dev.empty(1000, np.uint32)
    run("mov.u32 %r1, %tid.x; mov.u32 %r2, %ctaid.x; mad.lo.u32 %r3, %r2, 40, %r1; mad.wide.u32 %d1, %r3, 4, %d60; "
        "st.global.u32 [%d1], %r3;", [o], 25, 40, dev=dev, order=order, batch_threads=batch)
    assert (o.numpy() == np.arange(1000)).all()
