"""The names, units and currencies of the tiny domain, by their CLDR codes.

A code is left out where CLDR's surface would be ambiguous in a language: Russian "Сомали" is both
Somalia and, as a sentence, the Somali language, so the language is not here.
"""

COUNTRIES = tuple(
    "AF AL DZ AO AR AM AU AT AZ BD BE BJ BO BW BR BG BF KH CM CA TD CL CN CO CR HR CU CY DK EC EG "
    "EE ET FI FR GA DE GH GR GT GN HT HN HU IS IN ID IR IQ IE IL IT JM JP JO KZ KE KW LV LB LR LY "
    "LT MG MW MY ML MT MR MX MN MA MZ NA NP NL NZ NI NE NG NO PK PA PY PE PH PL PT RO RU RW SN SG "
    "SK SI SO ES LK SD SE CH SY TZ TH TN TR UG UA GB US UY VE VN YE ZM ZW".split()
)
LANGUAGE_NAMES = tuple(
    "en fr de es ru hi zh sw pt el ar bn ur ja ko vi th tr fa he it nl sv da fi pl cs sk hu "
    "ro bg uk sr hr sl lt lv et is ga cy eu ca la sq hy ka am ha yo zu af id ms ta te".split()
)
CURRENCIES = tuple(
    "USD EUR GBP JPY CNY INR RUB BRL CHF CAD AUD NZD MXN ZAR KES TZS UGX NGN EGP TRY SEK NOK DKK "
    "PLN CZK THB KRW IDR VND PHP ILS SAR ARS CLP COP PKR UAH".split()
)
WHOLE_CURRENCIES = frozenset(("JPY", "KRW", "VND", "CLP", "UGX"))
UNITS = (
    "length-kilometer",
    "length-meter",
    "length-centimeter",
    "length-mile",
    "length-foot",
    "mass-kilogram",
    "mass-gram",
    "mass-tonne",
    "mass-pound",
    "volume-liter",
    "volume-milliliter",
    "area-square-kilometer",
    "area-square-meter",
    "area-hectare",
    "volume-cubic-meter",
    "duration-second",
    "duration-minute",
    "duration-hour",
    "duration-day",
    "duration-week",
    "speed-kilometer-per-hour",
    "speed-meter-per-second",
    "temperature-celsius",
    "energy-kilocalorie",
    "power-kilowatt",
    "electric-volt",
    "digital-megabyte",
    "digital-gigabyte",
)
