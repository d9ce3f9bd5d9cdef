"""Machine code as cuobjdump prints it: instructions, loops, memory accesses, cycles."""

from __future__ import annotations

import machine_code

HOPPER = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;                      /* 0x00000a00ff017b82 */
                                                                               /* 0x000e620000000800 */
        /*0010*/               @P0 LDG.E.128 R4, desc[UR4][R2.64] ;            /* 0x0 */
        /*0020*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24 ;
        /*0030*/                   FFMA R1, R2, R3, R4 ;
        /*0040*/              @!P1 BRA 0x20 ;
        /*0050*/                   BRA 0x70 ;
        /*0060*/                   STL [R1], R2 ;
        /*0070*/                   STG.E.U16 desc[UR4][R2.64], R4 ;
        /*0080*/                   EXIT ;
        /*0090*/                   RET.REL.NODEC R2 0x0 ;
        /*00a0*/                   BRA 0xa0;
"""


def test_machine_code_is_read_up_to_its_last_exit_and_loops_count_as_often_as_they_run():
    instructions = machine_code.parse(HOPPER)
    assert machine_code.loops(instructions) == [(0x20, 0x40)]
    counts = machine_code.executed(instructions, trips=[5])
    assert counts["HGMMA.64x64x16.F32.BF16"] == counts["FFMA"] == 5
    assert counts["LDG.E.128"] == counts["EXIT"] == 1
    assert "RET.REL.NODEC" not in counts
    assert machine_code.matrix_instructions(counts) == 5
    assert machine_code.summary(counts) == machine_code.Summary(
        instructions=sum(counts.values()),
        matrix_instructions=5,
        loads=1,
        wide_loads=1,
        stores=1,
        wide_stores=0,
        local_accesses=1,
    )
    assert (
        machine_code.busy_cycles(counts)["matrix"] == 5 * 32
    )  # 64 x 64 x 16 products for four quarters of 512 a cycle
