# SPDX-License-Identifier: Apache-2.0
"""What [`RuleSegmenter`] knows of words: behind which of them a full stop ends no sentence."""

# Stand before a name, with a capital: Dr. Li, but "one more rep. Then".
TITLES = frozenset(
    """
    adm brig capt cmdr col comdr cpl dr drs fr frau gen gov herr hon hr insp lt maj messrs mlle mm mme mr mrs ms mt mx
    prof pvt rep rev sen sgt sr sra srta st supt
    """.split()
)
# Stand in the middle of a sentence.
INNER = frozenset(
    """
    approx bzw ca cf dept dist e.g eg engr esp est evtl ex ext ggf hrsg i.e ie incl inkl misc p.ex prop resp s.a d.h
    temp trans u.a univ v vgl viz vs z.b
    """.split()
)
# Stand before a number: No. 5, Fig. A2, Dec. 25, Li et al. (2020).
NUMBERED = frozenset(
    """
    abs al apr art aug ave bd bldg ch chap chr dec def eq eqs feb fig figs jan jul jun lem mar max min no nos nov nr
    num oct op p par para pp prop pt sec sect sep sept tab tel thm vol vols
    """.split()
)
# End a sentence where a capital letter follows.
AMBIGUOUS = frozenset(
    """
    a.m al am b.sc bros co corp etc inc jr ltd m.sc p.m ph.d pm sr usw
    """.split()
)
# After a letter with a dot, or several (J. R. R., U.S.), these start a sentence; other words with a capital are taken
# for a name.
STARTERS = frozenset(
    """
    a after all also although an and as at because before but by do each every finally first for from hence here how
    however i if in is it its let many most next no now of on one or our people she since so some that the their then
    there therefore these they this those though thus to we what when where which while who why with yes yet you your
    """.split()
)
# After a day's number and a dot: am 3. Mai.
MONTHS = frozenset(
    "januar jänner februar märz april mai juni juli "  # codespell:ignore
    "august september oktober november dezember".split()  # codespell:ignore
)
