import asyncpg
async def test_pg(postgres_dsn):
    c = await asyncpg.connect(postgres_dsn)
    print(await c.fetch("select schema_name from information_schema.schemata"))
    await c.close()
async def test_pg2(postgres_dsn, valkey_url):
    c = await asyncpg.connect(postgres_dsn)
    await c.close()
