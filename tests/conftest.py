import sys
sys.path.insert(0,"/work/main/tests/helpers")
_s=open("/work/main/tests/conftest.py").read().replace("__file__", "'/work/main/tests/conftest.py'")
exec(compile(_s,"/work/main/tests/conftest.py","exec"),globals())
exec(compile(open("/work/main/tests/hub/conftest.py").read(),"/work/main/tests/hub/conftest.py","exec"),globals())
