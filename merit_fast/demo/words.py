"""Frequent English words to inflect. Their forms come from the packages that `sources` names."""

VERBS = """
add agree allow answer appear arrive ask bake become begin bite blow borrow break bring build buy
call carry catch change choose clean close come copy count cry cut dance decide deny drag draw drink
drive drop eat enjoy enter fall feed feel fight find finish follow forget forgive freeze get give go
grow happen hear hide hit hold hope hurry hurt invite jump keep kick know laugh lead leave lend let
like listen live look lose love make marry meet move need offer open paint pass plan play pray pull
push put rain reach read rely rest ride ring rise rob rub run say see seek sell send serve shake
share shoot shop shut sing sink sit sleep slide smile speak spend stand start steal step stick stop
study swear sweep swim take talk teach tell thank think throw touch try turn use visit wait walk
want wash watch wear win work worry write
"""

NOUNS = """
animal apple army baby bag bank beach book boy branch bridge brother car cat chair child city clock
cow desk diary dish doctor door eye factory farm fly foot friend game garden girl hand hat head hero
hill hour house idea island journey judge key king kiss knife lady lamp lesson letter library
machine man map match monkey month mother mountain mouse nation nurse page patch photo picture plan
prize queen river sheep shelf ship shoe sister spy star step story street student table teacher
tooth torch town toy tree valley village wall week wife window wolf woman year
"""

ADJECTIVES = """
angry bad big bitter black blue bold brave brief bright broad calm cheap clean clear clever cloudy
cold cool crazy dark dear deep dirty dry dull dusty early easy faint fair fast fat fine firm fit
flat fresh friendly full funny fuzzy gentle good grand gray great green happy hard harsh healthy
heavy high hot huge humble hungry icy juicy kind large late lazy light little long loose loud lovely
low lucky mad mean mild narrow near neat new nice noble noisy odd pale plain poor pretty proud pure
quick quiet rare red rich ripe rough round rude sad safe salty sharp shiny short shy silly simple
slim slow small smart smooth soft sore sour steep stiff strange strict strong sunny sweet tall tasty
thick thin tight tiny tough ugly warm weak wealthy wet white wide wild windy wise young
"""
